"""The device side of an engine: turns a step plan into tokens.

Holds the model, the KV pages and the per-sample state that lives on the device. `launch` only
enqueues work; the answer is read when `Launched.results` is called, which is where the host waits.

Shapes: T rows of a step, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fourfold.engine.answers import PromptLogprobs, fetch_drawn, fetch_prompt
from fourfold.engine.config import EngineConfig
from fourfold.engine.graphs import StepGraph, StepGraphs, round_room, sampled_rows
from fourfold.engine.memory import allocate_pages
from fourfold.engine.program import StepOutputs, input_sizes, run_step
from fourfold.engine.progress import Progress, Reached
from fourfold.engine.sampler import Samples
from fourfold.engine.scheduler import Sampled, StepPlan, Work
from fourfold.engine.shortage import is_shortage
from fourfold.engine.warming import largest_work, usual_decodes, usual_steps
from fourfold.errors import ConfigError
from fourfold.kernels.decode_attention import DecodePlanner
from fourfold.kernels.staging import Ints, Staging, padded
from fourfold.models.decoder import Decoder
from fourfold.quadrants.decode_attention import decode_planner
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, PageShape, Span
from fourfold.quadrants.step import CodedWork, lay_out

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step under way. `results` waits for the device and answers each work of the plan;
    `reached` tells, where it can, in how many layers' pages its prompts are by now."""

    results: Callable[[], list[Sampled]]
    reached: Reached | None = None


class _Enqueued(NamedTuple):
    """What a step will leave, the first row of its prompts, and how far it is."""

    outputs: StepOutputs
    first_prefill_row: int
    reached: Reached | None


class Runner:
    """One model on one device. Used by the engine's thread alone."""

    def __init__(
        self, model: Decoder, config: EngineConfig, shape: PageShape, *, share_pages: bool = False
    ) -> None:
        self.model = model
        self.device = model.frequencies.device
        self._config = config = config.on(self.device.type)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cpu":
            _keep_freed_memory()
        else:
            torch.cuda.synchronize(self.device)
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # no type given
            self._stream = stream
        with self.on_stream():
            self.pages, self.page_count = allocate_pages(model, config, shape, shared=share_pages)
            self._samples = Samples(config.running, model.config.vocabulary, self.device)
        self._progress = Progress(model.config.layers, self.device) if self._stream else None
        self._cores = torch.get_num_threads()
        self._decode_threads = config.decode_threads or self._cores
        self.stored: Callable[[Iterable[int], Iterable[Work]], None] = lambda layers, chunks: None
        """Called with layers in whose pages chunks of prompts are now, while later layers are still
        to be computed; where launching is computing."""
        self._graphs: StepGraphs | None = None
        self._planner: DecodePlanner | None = None
        self._ahead: Iterator[tuple[list[Span], list[Span]]] = iter(())
        self._largest_due = False
        """Whether the largest room is to be recorded before the next graph is."""
        self._largest_again = False
        """Whether that was done since graphs were forgotten last."""
        if config.cuda_graphs and isinstance(self.pages, CodedPages) and self._progress is not None:
            self._graphs = StepGraphs(model, self.pages, self._samples, self._progress)
            self._planner = self._new_planner()

    @property
    def max_context(self) -> int:
        """Tokens one sample can hold: what the model knows and the pages can keep."""
        return min(self.model.config.max_positions, self.page_count * PAGE_TOKENS)

    @property
    def graphs(self) -> int:
        """CUDA graphs recorded so far."""
        return self._graphs.recorded if self._graphs else 0

    @property
    def usable(self) -> bool:
        """Whether the device still computes. After some errors it does so no more for this process,
        whatever it is asked."""
        if self._stream is not None:
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                return False
        return True

    def settle(self) -> None:
        """Waits for what is enqueued, which still writes to memory that will be given up."""
        if self._stream is not None:
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                self._stream.synchronize()

    def free_memory(self) -> None:
        """Gives up what can be made again, graphs above all, and what a step that failed may have
        left of its samples. Every step before it must be read before the next is launched.

        Graphs are recorded again as they are needed, after the largest, for the sake of the pool;
        but not where the last shortage came although that was done: then smaller rooms alone may
        fit.
        """
        self._samples.restart()
        self._ahead = iter(())
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.forget()
            self._largest_due, self._largest_again = not self._largest_again, False
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def warm(self) -> None:
        """Records the largest graph, and those that decoding will need first. Use it before the
        first step: what the pages hold is overwritten. Raises `ConfigError` where the largest step
        does not fit beside the pages."""
        if self._graphs is None:
            return
        with self.on_stream():
            try:
                self._padded_step(self._largest_work(), StepGraph.record)
                for decodes in usual_decodes(self._config.running, self.page_count):
                    work = CodedWork(decodes, [], self._new_planner())
                    self._padded_step(work, StepGraph.run)
            except Exception as error:
                if not is_shortage(error):
                    raise
                raise ConfigError(
                    f"a step of {self._config.tokens} tokens does not fit beside the KV pages; "
                    "lower --kv-memory-gib or --step-tokens"
                ) from None
            torch.cuda.synchronize(self.device)
        self._ahead = usual_steps(self._config, self.max_context, self.page_count)

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Records one more graph that a step will probably need, while there is nothing else to do;
        False where there is none left. No step may be under way."""
        step = next(self._ahead, None)
        if step is None:
            return False
        with self.on_stream():
            recorded = self._record_if_it_fits(CodedWork(*step, self._new_planner()))
        if recorded is None:
            self.free_memory()
        elif not recorded:
            self._ahead = iter(())
        return True

    def _record_largest(self) -> None:
        """Records the largest room in a pool without graphs, if it fits."""
        assert self._graphs is not None
        self._largest_due = False
        torch.cuda.empty_cache()  # a recording cannot take what is kept for other steps
        recorded = self._record_if_it_fits(self._largest_work())
        if recorded is None:
            logger.warning("the largest step did not fit into memory again; recording smaller ones")
            self._graphs.forget()
            torch.cuda.empty_cache()
        self._largest_again = bool(recorded)

    def _record_if_it_fits(self, work: CodedWork) -> bool | None:
        """Whether there is a graph for some work now; None where memory ran short."""
        try:
            return bool(self._padded_step(work, StepGraph.record))
        except Exception as error:
            if not is_shortage(error):
                raise
            return None  # the caller frees memory, since the error holds what had been allocated

    def _largest_work(self) -> CodedWork:
        planner = self._new_planner()
        return largest_work(self._config, self.max_context, self.page_count, planner)

    def _new_planner(self) -> DecodePlanner | None:
        """One that knows no step yet: for the steps that are served, or one that is made up."""
        assert isinstance(self.pages, CodedPages)
        return decode_planner(self.pages, self.model.config.query_heads)

    def _padded_step(
        self, work: CodedWork, do: Callable[[StepGraph, CodedWork, Mapping[str, Ints]], object]
    ) -> object:
        """What is to be done with the graph for some work, of which nothing is read or sampled;
        returns what that does."""
        assert self._graphs is not None
        room = round_room(work, self._max_pages)
        assert room is not None
        params, adjustment = self._samples.params([])
        graph = self._graphs.step(room, adjustment=adjustment, kept=False)
        room = graph.room
        inputs = self._inputs(
            StepPlan((), ()), params, room.decode_rows, room.prefill_rows, sampled_rows(room)
        )
        return do(graph, work, inputs)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Enqueues one step."""
        if self.device.type == "cpu":
            torch.set_num_threads(self._cores if plan.prefills else self._decode_threads)
        with self.on_stream():
            sampling = [work for work in plan.work if work.samples]
            wanted = [work.sequence.request.sampling.logprobs for work in sampling]
            outputs, first_prefill_row, reached = self._enqueue(plan, sampling)
            drawn = fetch_drawn(outputs, wanted) if sampling else None
            prompts = self._prompt_logprobs(outputs, plan, first_prefill_row)

        def results() -> list[Sampled]:
            tokens = iter(drawn() if drawn else ())
            answers = [next(tokens) if work.samples else Sampled() for work in plan.work]
            for row, of_prompt in prompts.items():
                answers[row] = answers[row]._replace(prompt_logprobs=of_prompt())
            return answers

        return Launched(results, reached)

    def _enqueue(self, plan: StepPlan, sampling: Sequence[Work]) -> _Enqueued:
        """Runs a step as a graph if it can be one."""
        decodes = [_span(work) for work in plan.decodes]
        prefills = [_span(work) for work in plan.prefills]
        params, adjustment = self._samples.params([work.sequence for work in sampling])
        kept = any(_reports(work) for work in plan.work)
        if self._graphs is not None:
            coded = CodedWork(decodes, prefills, self._planner)
            room = round_room(coded, self._max_pages)
            if room is not None:
                if self._largest_due:
                    self._record_largest()
                graph = self._graphs.step(room, adjustment=adjustment, kept=kept)
                room = graph.room
                rows = (room.decode_rows, room.prefill_rows, sampled_rows(room))
                inputs = self._inputs(plan, params, *rows)
                outputs = graph.run(coded, inputs)
                reached = self._reached(inputs["number"], room.prefill_rows)
                return _Enqueued(outputs, room.decode_rows, reached)
        rows = (len(decodes), sum(span.length for span in prefills), len(sampling))
        arrays = Staging(input_sizes(rows[0] + rows[1], rows[2]), self.device)
        inputs = self._inputs(plan, params, *rows)
        arrays.load(inputs)
        step = lay_out(self.pages, decodes, prefills, heads=self.model.config.query_heads)
        if self._progress is None:
            step.stored = lambda layer: self.stored([layer], plan.prefills)
        else:
            self._progress.mark(step, arrays["number"], rows[1])
        outputs = run_step(self.model, step, arrays, self._samples, adjustment=adjustment)
        return _Enqueued(outputs, len(decodes), self._reached(inputs["number"], rows[1]))

    def _reached(self, number: Ints, prefill_rows: int) -> Reached | None:
        return self._progress.of(number, prefill_rows) if self._progress else None

    def _inputs(
        self, plan: StepPlan, params: Ints, decode_rows: int, prefill_rows: int, sampled: int
    ) -> dict[str, Ints]:
        """What `run_step` reads of the next step, filled up to a room. Tokens that the host has not
        seen yet are named by their slot."""
        number = self._progress.begin(prefill_rows) if self._progress else np.zeros(1, np.int32)
        tokens = np.zeros(decode_rows + prefill_rows, np.int32)
        sources = np.full(decode_rows + prefill_rows, -1, np.int32)
        for row, work in enumerate(plan.decodes):
            sequence = work.sequence
            if work.start < len(sequence.tokens):
                tokens[row] = sequence.tokens[work.start]
            else:
                sources[row] = sequence.slot
        drawn = [row for row, work in enumerate(plan.decodes) if work.samples]
        end = decode_rows
        for work in plan.prefills:
            first, end = end, end + work.length
            tokens[first:end] = work.sequence.tokens[work.start : work.start + work.length]
            if work.samples:
                drawn.append(end - 1)
        return {
            "number": number,
            "tokens": tokens,
            "sources": sources,
            "sampled": padded(np.array(drawn, np.int32), sampled, 0),
            "params": self._samples.padded(params, sampled),
        }

    def _prompt_logprobs(
        self, outputs: StepOutputs, plan: StepPlan, first_row: int
    ) -> dict[int, PromptLogprobs]:
        """For each work of a prompt that wants them, by its place in the plan: log-probabilities of
        the tokens after its rows, as far as they are the prompt's."""
        answers = {}
        for place, work in enumerate(plan.prefills, len(plan.decodes)):
            sequence, first = work.sequence, first_row
            first_row += work.length
            known = min(work.length, sequence.prompt_length - 1 - work.start)
            if sequence.wants_prompt_logprobs and known > 0:
                assert outputs.hidden_TD is not None
                answers[place] = fetch_prompt(
                    outputs.hidden_TD[first : first + known],
                    sequence.tokens[work.start + 1 : work.start + 1 + known],
                    sequence.request.sampling.logprobs or 0,
                    self.model.logits,
                )
        return answers

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """All is enqueued on one stream of its own, since the default one records nothing."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    @property
    def _max_pages(self) -> int:
        return -(-self.max_context // PAGE_TOKENS)


def _span(work: Work) -> Span:
    return Span(work.start, work.length, work.sequence.pages, work.sequence.slot)


def _reports(work: Work) -> bool:
    """Whether more is read of a step than tokens and their log-probabilities."""
    sequence = work.sequence
    return bool(sequence.request.sampling.logprobs) or sequence.wants_prompt_logprobs


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    Every step frees and allocates activations of megabytes; getting them back as fresh pages costs
    more than the arithmetic on them (docs/experiments-2026-11-24.md). Elsewhere: nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)

"""The device side of an engine: turns a step plan into tokens.

Holds the model, the KV pages and the per-sample state that lives on the device. `launch` only
enqueues work; the answer is read when `Launched.results` is called, which is where the host waits.

Shapes: T rows of a step, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import SamplingParams, TokenLogprob
from fourfold.engine.sampler import TokenCounts, likeliest, logprobs, penalises, sample_row
from fourfold.engine.scheduler import Sampled, StepPlan, Work
from fourfold.errors import ConfigError
from fourfold.kernels.sample import SampleParams, SampleRow, sample
from fourfold.models.decoder import Decoder
from fourfold.quadrants.kv_pages import PAGE_TOKENS, PageShape, Span, make_pages
from fourfold.quadrants.step import QuadrantStep

_CPU_KV_GIB = 2.0
_GPU_FREE_SHARE = 0.9
# Logits of a whole prompt are made this many rows at a time, to bound their memory.
_PROMPT_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step under way. `results` waits for the device and answers each work of the plan."""

    results: Callable[[], list[Sampled]]


class Runner:
    """One model on one device. Used by the engine's thread alone."""

    def __init__(self, model: Decoder, config: EngineConfig, shape: PageShape) -> None:
        self.model = model
        self.device = model.frequencies.device
        page_bytes = shape.page_bytes
        size = self._kv_bytes(config) - config.max_running * shape.slot_bytes
        if size < 2 * page_bytes:
            raise ConfigError(
                f"{max(0, size // page_bytes):.0f} KV pages of {page_bytes / 2**20:.1f} MiB fit "
                f"beside {config.max_running} open ones; raise --kv-memory-gib"
            )
        try:
            count = int(size // page_bytes)
            self.pages = make_pages(shape, count, config.max_running, self.device)
        except (MemoryError, OverflowError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{size / 2**30:g} GiB of KV pages cannot be allocated on {self.device}; "
                "lower --kv-memory-gib"
            ) from error
        if self.device.type == "cpu":
            _keep_freed_memory()
        self.page_count = count
        self._cores = torch.get_num_threads()
        self._decode_threads = config.decode_threads or self._cores
        self._last_token = torch.zeros(config.max_running, dtype=torch.int64, device=self.device)
        self._counts = TokenCounts(config.max_running, model.config.vocabulary, self.device)
        self._counted: dict[int, tuple[int, int]] = {}

    @property
    def max_context(self) -> int:
        """Tokens one sample can hold: what the model knows and the pages can keep."""
        return min(self.model.config.max_positions, self.page_count * PAGE_TOKENS)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Enqueues one step."""
        if self.device.type == "cpu":
            torch.set_num_threads(self._cores if plan.prefills else self._decode_threads)
        step = QuadrantStep(
            self.pages,
            [_span(work) for work in plan.decodes],
            [_span(work) for work in plan.prefills],
            heads=self.model.config.query_heads,
        )
        hidden_TD = self.model(self._input_tokens(plan), step.positions_T, step)
        sampling = [work for work in plan.work if work.samples]
        row_answers = self._sample(hidden_TD, plan, sampling) if sampling else None
        prompt_answers = self._prompt_logprobs(hidden_TD, plan)

        def results() -> list[Sampled]:
            tokens = iter(row_answers() if row_answers else ())
            return [
                dataclasses.replace(
                    next(tokens) if work.samples else Sampled(),
                    prompt_logprobs=prompt_answers.get(row, tuple)(),
                )
                for row, work in enumerate(plan.work)
            ]

        return Launched(results)

    def _kv_bytes(self, config: EngineConfig) -> float:
        if config.kv_memory_gib is not None:
            return config.kv_memory_gib * 2**30
        if self.device.type == "cpu":
            return _CPU_KV_GIB * 2**30
        free, _ = torch.cuda.mem_get_info(self.device)
        return free * _GPU_FREE_SHARE

    def _input_tokens(self, plan: StepPlan) -> Tensor:
        """The rows' token ids; those the host has not seen yet come from the device."""
        known = [
            token
            for work in plan.work
            for token in work.sequence.tokens[work.start : work.start + work.length] or (0,)
        ]
        tokens_T = torch.tensor(known).to(self.device, non_blocking=True)
        unseen = [
            (row, work.sequence.slot)
            for row, work in enumerate(plan.decodes)
            if work.start >= len(work.sequence.tokens)
        ]
        if unseen:
            rows, slots = torch.tensor(unseen, device=self.device).unbind(-1)
            tokens_T[rows] = self._last_token[slots]
        return tokens_T

    def _sample(
        self, hidden_TD: Tensor, plan: StepPlan, sampling: list[Work]
    ) -> Callable[[], list[Sampled]]:
        logits_SV = self.model.logits(hidden_TD[_last_rows(plan, self.device)])
        asked = [work.sequence.request.sampling for work in sampling]
        wanted = [params.logprobs for params in asked]
        params = SampleParams.pack([self._row(work) for work in sampling], self.device)
        tables = self._counts.tables
        drawn = sample(logits_SV, params, tables)
        slots_S = params.slot.long()
        self._last_token[slots_S] = drawn.tokens_S
        if tables is not None and any(map(penalises, asked)):
            # Of every row: counts of samples that penalise nothing are read by nobody.
            tables.add(slots_S, drawn.tokens_S)
        if all(count is None for count in wanted):
            return lambda: [Sampled(token=token) for token in drawn.tokens_S.tolist()]
        return _read_drawn(logits_SV, drawn.tokens_S, drawn.logprobs_S, wanted)

    def _row(self, work: Work) -> SampleRow:
        sequence = work.sequence
        params: SamplingParams = sequence.request.sampling
        stay = (sequence.arrival, sequence.admissions)
        seed = sequence.request.request_id if params.seed is None else params.seed
        row = sample_row(params, seed, sequence.index, sequence.length, sequence.slot)
        if row.adjusted and self._counted.get(sequence.slot) != stay:
            self._counted[sequence.slot] = stay
            output = sequence.tokens[sequence.prompt_length :]
            self._counts.start(
                sequence.slot, sequence.request.prompt_ids, output, params.logit_bias
            )
        return row

    def _prompt_logprobs(
        self, hidden_TD: Tensor, plan: StepPlan
    ) -> dict[int, Callable[[], tuple[TokenLogprob, ...]]]:
        """For each work of a prompt that wants them: log-probabilities of the tokens after its
        rows, as far as they are the prompt's."""
        answers: dict[int, Callable[[], tuple[TokenLogprob, ...]]] = {}
        start = 0
        for row, work in enumerate(plan.work):
            sequence = work.sequence
            known = min(work.length, sequence.prompt_length - 1 - work.start)
            if sequence.wants_prompt_logprobs and known > 0:
                alternatives = sequence.request.sampling.logprobs or 0
                reads = []
                for first in range(0, known, _PROMPT_ROWS):
                    rows = min(_PROMPT_ROWS, known - first)
                    hidden = hidden_TD[start + first : start + first + rows]
                    after = work.start + first + 1
                    targets = torch.tensor(
                        sequence.tokens[after : after + rows], device=self.device
                    )
                    reads.append(_read_logprobs(self.model.logits(hidden), targets, alternatives))
                answers[row] = functools.partial(_concatenate, reads)
            start += work.length
        return answers


def _span(work: Work) -> Span:
    return Span(work.start, work.length, work.sequence.pages, work.sequence.slot)


def _last_rows(plan: StepPlan, device: torch.device) -> Tensor:
    rows, end = [], 0
    for work in plan.work:
        end += work.length
        if work.samples:
            rows.append(end - 1)
    return torch.tensor(rows, device=device)


def _read_drawn(
    logits_SV: Tensor, tokens_S: Tensor, logprobs_S: Tensor, wanted: list[int | None]
) -> Callable[[], list[Sampled]]:
    """Answers of rows of which each wants so many alternatives, or no log-probability (None)."""
    places = [place for place, count in enumerate(wanted) if count]
    top = None
    if places:
        logits_SV = logits_SV[torch.tensor(places).to(logits_SV.device, non_blocking=True)]
        top = likeliest(logits_SV, max(count or 0 for count in wanted))

    def answers() -> list[Sampled]:
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(wanted)
        if top is not None:
            listed = zip(places, top.indices.tolist(), top.values.tolist(), strict=True)
            for place, ids, values in listed:
                tops[place] = tuple(zip(ids, values, strict=True))[: wanted[place]]
        return [
            Sampled(
                token=token,
                logprob=None if count is None else TokenLogprob(token, logprob, others),
            )
            for token, logprob, others, count in zip(
                tokens_S.tolist(), logprobs_S.tolist(), tops, wanted, strict=True
            )
        ]

    return answers


def _read_logprobs(
    logits_SV: Tensor, tokens_S: Tensor, alternatives: int
) -> Callable[[], list[TokenLogprob]]:
    chosen_S, top = logprobs(logits_SV, tokens_S, alternatives)

    def read() -> list[TokenLogprob]:
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, (ids, values) in zip(
                tokens_S.tolist(), chosen_S.tolist(), likeliest, strict=True
            )
        ]

    return read


def _concatenate(reads: list[Callable[[], list[TokenLogprob]]]) -> tuple[TokenLogprob, ...]:
    return tuple(entry for read in reads for entry in read())


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    Every step frees and allocates activations of megabytes; getting them back as fresh pages costs
    more than the arithmetic on them (measured, see docs/experiments.md). Elsewhere: nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)

"""Steps as CUDA graphs: what a step launches is recorded once for its room, then replayed.

A launch from Python costs tens of microseconds, and a step makes hundreds. A graph costs one. Steps
are rounded up to few rooms (`round_room`), and a room's graph is recorded when the first step needs
it. All graphs share one pool of memory: they never run at the same time, and what is read of one is
copied before the next. The largest room is recorded first in a pool, for its pieces of memory are
then large enough for all others; recorded in the order of their sizes, each room would need pieces
of its own.

Shapes: T rows of a step, S sampled rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.engine.program import StepOutputs, input_sizes, run_step
from fourfold.engine.progress import Progress
from fourfold.engine.sampler import Adjustment, Samples
from fourfold.engine.shortage import is_shortage
from fourfold.kernels.decode_attention import DecodeShape, PlanCapacity
from fourfold.kernels.decode_attention.buffers import empty_partials
from fourfold.kernels.prefill_attention import PrefillRoom
from fourfold.kernels.staging import Ints
from fourfold.models.decoder import Decoder
from fourfold.quadrants.decode_attention import decode_shape
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages
from fourfold.quadrants.step import CodedStep, CodedWork, StepRoom

logger = logging.getLogger(__name__)

# Decode rows when nothing is prefilled, and beside prefill rows, where padding costs less than one
# more graph does.
_DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)
MIXED_DECODE_ROWS = (16, 64, 128, 256, 512)
_LEAST_CHUNKS = 16
# Of prompts that come together: as most are at least, and as they have to be on average.
_TOKENS_OF_A_CHUNK = (64, 8)
# A graph holds about 10 MB beside the shared pool.
_MOST_GRAPHS = 128
# Tasks of decode attention that a graph may have more than a step's room: each takes its program a
# look at a number, and beside prompts all may be built for many, which takes them longer.
_IDLE_TASKS = 512
# And rows that are sampled.
_IDLE_SAMPLES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Key:
    """Steps of one key are replays of one graph."""

    room: StepRoom
    adjustment: Adjustment
    kept: bool

    def serves(self, other: _Key, kv_heads: int) -> bool:
        """Whether steps of another key can take this one's graph, at hardly any cost: of as many
        rows, with no more than a few tasks of decode attention and samples that are not there.
        Where nothing is prefilled, attention must be built for as many programs, too."""
        room, needed = self.room, other.room
        if self.adjustment is not other.adjustment or self.kept < other.kept:
            return False
        if (room.decode_rows, room.prefill_rows) != (needed.decode_rows, needed.prefill_rows):
            return False
        if not 0 <= sampled_rows(room) - sampled_rows(needed) <= _IDLE_SAMPLES:
            return False
        if room.decode is None or needed.decode is None:
            return room.decode is needed.decode
        if room.prefill is None and room.decode.are_few(kv_heads) != needed.decode.are_few(
            kv_heads
        ):
            return False
        return (
            room.decode.holds(needed.decode)
            and room.decode.tasks_of_all - needed.decode.tasks_of_all <= _IDLE_TASKS
            and room.decode.merged == needed.decode.merged
            and room.decode.pages == needed.decode.pages
        )

    @property
    def size(self) -> tuple[int, int]:
        """Of two that serve, the one with less is better."""
        tasks = self.room.decode.tasks_of_all if self.room.decode else 0
        return tasks, sampled_rows(self.room)


def round_room(work: CodedWork, max_pages: int) -> StepRoom | None:
    """The room that a step is rounded up to, or None where it is too unusual to be worth a graph.

    Args:
        work: the step.
        max_pages: of a sequence.
    """
    decode_rows = len(work.decodes)
    prefill_rows = sum(span.length for span in work.prefills)
    chunks = len(work.prefills)
    if decode_rows:
        decode_rows = _round_up(decode_rows, MIXED_DECODE_ROWS if chunks else _DECODE_ROWS)
    prefill = None
    if chunks:
        rows = round_rows(prefill_rows)
        usual, most = (max(_LEAST_CHUNKS, rows // tokens) for tokens in _TOKENS_OF_A_CHUNK)
        if chunks > most:
            return None
        room_for_chunks = usual if chunks <= usual else most
        prefill = PrefillRoom(chunks=room_for_chunks, rows=rows, pages=max_pages)
    return StepRoom(
        decode_rows=decode_rows,
        decode=PlanCapacity.covering(work.plan, decode_rows, beside_prompts=chunks > 0)
        if work.plan
        else None,
        prefill=prefill,
    )


def sampled_rows(room: StepRoom) -> int:
    """S: as many rows as can have their next token drawn."""
    return room.decode_rows + (room.prefill.chunks if room.prefill else 0)


class StepGraphs:
    """All graphs of one model. Used on the stream that is current when they are run."""

    def __init__(
        self, model: Decoder, pages: CodedPages, samples: Samples, progress: Progress
    ) -> None:
        self._model, self._pages, self._samples = model, pages, samples
        self._progress = progress
        self.pool = torch.cuda.graph_pool_handle()
        """Of memory."""
        self._graphs: OrderedDict[_Key, StepGraph] = OrderedDict()
        self._served: dict[_Key, _Key] = {}
        """By keys that take other keys' graphs, those."""
        self._partials: tuple[Tensor, Tensor] | None = None
        self.recorded = 0
        """Graphs recorded so far."""

    def step(self, room: StepRoom, *, adjustment: Adjustment, kept: bool) -> StepGraph:
        """The graph for steps of a room, recorded or not yet. Where none is, one that was recorded
        for a room that holds it serves as well.

        Args:
            room: as `round_room` makes them.
            adjustment: the tables that rows need.
            kept: whether hidden states and logits are read after a step, and not only tokens.
        """
        key = _Key(room=room, adjustment=adjustment, kept=kept)
        key = self._served.get(key, key)
        graph = self._graphs.get(key)
        if graph is None or graph.has_failed:
            graph = self._serving(key) or graph
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
                self._served.clear()
            graph = self._graphs[key] = StepGraph(self, key)
        self._graphs.move_to_end(graph.key)
        return graph

    def forget(self) -> None:
        """Drops all graphs; nothing may run."""
        self._graphs.clear()
        self._served.clear()
        self._partials = None
        self.leave_pool()

    def leave_pool(self) -> None:
        """Later graphs get another pool: one that no graph holds is gone for good, and one in which
        a recording broke off takes no further one."""
        self.pool = torch.cuda.graph_pool_handle()

    def _serving(self, key: _Key) -> StepGraph | None:
        """The best recorded graph that serves a key without one, from now on."""
        kv_heads = self._pages.shape.kv_heads
        serving = [
            k for k, graph in self._graphs.items() if graph.is_recorded and k.serves(key, kv_heads)
        ]
        if not serving:
            return None
        best = self._served[key] = min(serving, key=lambda other: other.size)
        return self._graphs[best]

    def partials_for(self, capacity: PlanCapacity, shape: DecodeShape) -> tuple[Tensor, Tensor]:
        """Room for partial results, shared by all graphs as far as it is large enough."""
        if self._partials is None or len(self._partials[1]) < capacity.partials:
            self._partials = empty_partials(shape, capacity, self._pages.device)
        return self._partials


class StepGraph:
    """Steps of one room."""

    def __init__(self, graphs: StepGraphs, key: _Key) -> None:
        self._graphs, self.key = graphs, key
        model, pages = graphs._model, graphs._pages
        room, heads = key.room, model.config.query_heads
        partials = None
        if room.decode is not None:
            partials = graphs.partials_for(room.decode, decode_shape(pages, heads))
        self._step = CodedStep(
            pages,
            room,
            heads,
            beside=input_sizes(room.rows, sampled_rows(room)),
            partials=partials,
        )
        graphs._progress.mark(self._step, self._step.arrays["number"], room.prefill_rows)
        self._tried = False
        self._recorded: torch.cuda.CUDAGraph | None = None
        self._outputs: StepOutputs | None = None

    @property
    def room(self) -> StepRoom:
        """What its steps are filled up to."""
        return self.key.room

    @property
    def is_recorded(self) -> bool:
        """Whether there is a graph to replay."""
        return self._recorded is not None

    @property
    def has_failed(self) -> bool:
        """Whether it could not be recorded."""
        return self._tried and self._recorded is None

    def run(self, work: CodedWork, inputs: Mapping[str, Ints]) -> StepOutputs:
        """Enqueues a step that fits the room; `inputs` are those of `run_step`, filled up."""
        if not self.record(work, inputs):
            return self._enqueue()
        assert self._recorded is not None
        self._recorded.replay()
        assert self._outputs is not None
        return self._outputs

    def record(self, work: CodedWork, inputs: Mapping[str, Ints]) -> bool:
        """Gets ready for a step that fits the room, and records the graph if that was not tried;
        whether there is one now."""
        self._step.load(work, inputs)
        if not self._tried:
            self._tried = True
            self._record()
        return self.is_recorded

    def _record(self) -> None:
        """Records the graph; where that fails, steps of this room are launched kernel by kernel.
        Raises what says that memory ran short: then all graphs are to be forgotten."""
        graph = torch.cuda.CUDAGraph()
        # A collection during the recording could free what CUDA then must not free.
        collecting = gc.isenabled()
        gc.disable()
        try:
            # Relaxed, because a kernel's first launch loads it.
            graph.capture_begin(self._graphs.pool, capture_error_mode="relaxed")
            try:
                outputs = self._enqueue()
            except Exception:
                with contextlib.suppress(RuntimeError):  # the first error is the one that tells
                    graph.capture_end()
                raise
            graph.capture_end()
        except Exception as error:
            self._graphs.leave_pool()
            if is_shortage(error) or not isinstance(error, RuntimeError):
                raise
            logger.exception("a step of %d rows could not be recorded", self.key.room.rows)
            return
        finally:
            if collecting:
                gc.enable()
        # What nobody reads is the next graph's memory.
        kept = self.key.kept
        self._outputs = outputs if kept else outputs._replace(hidden_TD=None, logits_SV=None)
        self._recorded = graph
        self._graphs.recorded += 1

    def _enqueue(self) -> StepOutputs:
        graphs, step = self._graphs, self._step
        adjustment = self.key.adjustment
        return run_step(graphs._model, step, step.arrays, graphs._samples, adjustment=adjustment)


def usual_decode_rows(max_running: int) -> list[int]:
    """Decode rows whose graphs are worth recording before the first request comes."""
    return sorted({min(rows, max_running) for rows in _DECODE_ROWS})


def _round_up(rows: int, classes: tuple[int, ...]) -> int:
    place = bisect_left(classes, rows)
    return classes[place] if place < len(classes) else -(-rows // classes[-1]) * classes[-1]


def round_rows(rows: int) -> int:
    """To whole pages: a power of two, or so many eighths of one that a quarter is padding at most,
    and much less of it in large steps."""
    pages = -(-rows // PAGE_TOKENS)
    power = 1 << (pages - 1).bit_length()
    step = max(1, power // 8)
    return PAGE_TOKENS * -(-pages // step) * step

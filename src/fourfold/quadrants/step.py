"""One engine step laid out over the four quadrants.

The rows of a step are the decode rows first (one token of each decoding sequence), then the chunks
of prompts being prefilled. Attention splits there; the FFN takes all rows together, because the
experts' weights are then read once, and counts as prefill as soon as the step prefills anything.

Over coded pages a step lies in arrays of a fixed room, so that a CUDA graph captured with one step
can be replayed with another. Rows of that room which a step does not fill are *padding*: they are
computed with whatever is there, touch no page and no expert, and nobody reads them.

Shapes: T rows, H query heads, G KV heads, C head width, D model width.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.decode_attention import (
    DecodePlan,
    DecodePlanner,
    DecodeSequences,
    PlanBuffers,
    PlanCapacity,
    merge_and_quantize,
)
from fourfold.kernels.pages import seal_pages
from fourfold.kernels.prefill_attention import PrefillBatch, PrefillChunk, PrefillRoom
from fourfold.kernels.prefill_attention.batch import padded_group, prefill_arrays
from fourfold.kernels.staging import Ints, Staging
from fourfold.quadrants.decode_attention import (
    CodedDecodeAttention,
    FloatDecodeAttention,
    decode_planner,
    decode_sequences,
    decode_shape,
)
from fourfold.quadrants.decode_ffn import decode_ffn
from fourfold.quadrants.experts import Delta, ExpertWeights, Routing
from fourfold.quadrants.kv_pages import (
    CodedPages,
    CodedWrites,
    FloatPages,
    KVPages,
    Span,
)
from fourfold.quadrants.prefill_attention import (
    CodedPrefillAttention,
    FloatPrefillAttention,
    prefill_chunks,
)
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quadrants.projection import Projected
from fourfold.quantize.weights import Activations, CudaW8A8Weight, Weight


class QuadrantStep(abc.ABC):
    """The work of one step, described once and used by every layer.

    `positions_T` is each row's place in its sequence, `live_T` (None: all) is 0 for padding.
    """

    positions_T: Tensor
    live_T: Tensor | None = None
    prefills: bool
    """Whether it has rows of prompts."""
    stored: Callable[[int], None] = staticmethod(lambda layer: None)
    """Called when the rows' keys and values in a layer have been enqueued to their pages."""

    @abc.abstractmethod
    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        """Stores the rows' keys and values, then attends; [T, H C], for a weight that reads it."""

    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Delta:
        """The routed FFN of all rows; [T, D], perhaps still to be combined."""
        ffn = prefill_ffn if self.prefills else decode_ffn
        return ffn(x, routing, weights, self.live_T)


class FloatStep(QuadrantStep):
    """A step over float pages. `decodes` are spans of length 1."""

    def __init__(
        self, pages: FloatPages, decodes: Sequence[Span], prefills: Sequence[Span]
    ) -> None:
        spans = [*decodes, *prefills]
        positions_T = torch.from_numpy(_positions(spans))
        self.positions_T = positions_T.to(pages.device, non_blocking=True)
        self.prefills = bool(prefills)
        self._decode_rows = len(decodes)
        self._decode = FloatDecodeAttention(decodes, pages) if decodes else None
        self._prefill = FloatPrefillAttention(prefills, pages) if prefills else None
        self._writes = pages.writes(spans)

    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        q_THC, k_TGC, v_TGC = projected.rotated()
        self._writes.before_attention(layer, k_TGC, v_TGC)
        self.stored(layer)
        first = self._decode_rows
        parts = []
        if self._decode is not None:
            parts.append(self._decode(layer, q_THC[:first]))
        if self._prefill is not None:
            parts.append(self._prefill(layer, q_THC[first:], k_TGC[first:], v_TGC[first:]))
        out_THC = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Activations(out_THC.flatten(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRoom:
    """The largest step that fits; None where there is no room for such rows at all."""

    decode_rows: int
    decode: PlanCapacity | None
    prefill: PrefillRoom | None

    @property
    def prefill_rows(self) -> int:
        return self.prefill.rows if self.prefill else 0

    @property
    def rows(self) -> int:
        """T: decode rows, then prefill rows."""
        return self.decode_rows + self.prefill_rows


class CodedWork:
    """What a step over coded pages computes, on the host. `decodes` are spans of length 1, planned
    by `planner` on a GPU."""

    def __init__(
        self,
        decodes: Sequence[Span],
        prefills: Sequence[Span],
        planner: DecodePlanner | None,
    ) -> None:
        self.decodes, self.prefills = decodes, prefills
        self.sequences: DecodeSequences | None = None
        self.plan: DecodePlan | None = None
        if decodes:
            self.sequences = decode_sequences(decodes)
            self.plan = planner.plan(self.sequences) if planner else None

    @property
    def room(self) -> StepRoom:
        """Just enough room."""
        chunks = prefill_chunks(self.prefills)
        return StepRoom(
            decode_rows=len(self.decodes),
            decode=PlanCapacity.of(self.plan) if self.plan else None,
            prefill=PrefillRoom(
                chunks=len(chunks),
                rows=sum(chunk.rows for chunk in chunks),
                pages=max(1, max(chunk.pages_read for chunk in chunks)),
            )
            if chunks
            else None,
        )


class CodedStep(QuadrantStep):
    """Steps over coded pages, one after the other in the same arrays."""

    def __init__(
        self,
        pages: CodedPages,
        room: StepRoom,
        heads: int,
        *,
        beside: Mapping[str, int] | None = None,
        partials: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """
        Args:
            pages: where keys and values are kept.
            room: how large steps may be.
            heads: the model's query heads.
            beside: names and words of arrays that the caller loads with each step, in `arrays`.
            partials: for decode attention's partial results, of a room at least as large.
        """
        self.room = room
        self._pages, self._heads = pages, heads
        self._group = padded_group(heads, pages.shape.kv_heads)
        prefill_sizes = room.prefill.sizes(self._group) if room.prefill else {}
        plan_sizes = {"plan": PlanBuffers.words_needed(room.decode)} if room.decode else {}
        self.arrays = Staging(
            {
                **(beside or {}),
                "positions": room.rows,
                "live": room.rows,
                **CodedWrites.sizes(room.decode_rows, room.prefill_rows),
                **plan_sizes,
                **prefill_sizes,
            },
            pages.device,
        )
        self.positions_T, self.live_T = self.arrays["positions"], self.arrays["live"]
        self.prefills = room.prefill is not None
        self._writes = CodedWrites(pages, self.arrays)
        self._plan: PlanBuffers | None = None
        if room.decode is not None:
            self._plan = PlanBuffers(
                decode_shape(pages, heads),
                room.decode,
                pages.device,
                words=self.arrays["plan"],
                partials=partials,
            )
        self._decode = CodedDecodeAttention(pages, self._plan) if room.decode_rows else None
        self._prefill: CodedPrefillAttention | None = None
        self._see(())

    def load(self, work: CodedWork, beside: Mapping[str, Ints] | None = None) -> None:
        """Replaces the step, on the device after everything enqueued so far; does not wait."""
        room, chunks = self.room, prefill_chunks(work.prefills)
        positions, live = (np.zeros(room.rows, np.int32) for _ in range(2))
        for first, spans in ((0, work.decodes), (room.decode_rows, work.prefills)):
            known = _positions(spans)
            positions[first : first + len(known)] = known
            live[first : first + len(known)] = 1
        arrays = {
            **(beside or {}),
            "positions": positions,
            "live": live,
            **CodedWrites.arrays(work.decodes, work.prefills, room.decode_rows, room.prefill_rows),
        }
        if room.prefill is not None:
            arrays |= prefill_arrays(chunks, room.prefill, self._group)
        if self._plan is not None:
            assert work.plan is not None
            words = np.empty(self.arrays.size("plan"), np.int32)
            arrays["plan"] = words[: self._plan.fill(words, work.plan)]
        self.arrays.load(arrays)
        if self._decode is not None:
            self._decode.sequences = work.sequences
        self._see(chunks)

    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        q_THC, k_TGC, v_TGC = projected.rotated_into(self._writes.opened(layer), keep=self.prefills)
        merged = not isinstance(reader, CudaW8A8Weight)
        out_THC = self._decoded(layer, q_THC, merged=merged)
        if self._prefill is not None:
            assert k_TGC is not None
            assert v_TGC is not None
            first = self.room.decode_rows
            self._writes.before_attention(layer, k_TGC, v_TGC)
            self.stored(layer)
            self._prefill(layer, q_THC[first:], k_TGC[first:], v_TGC[first:], out_THC[first:])
        seals = self._writes.after_attention(layer)
        if isinstance(reader, CudaW8A8Weight):
            codes = merge_and_quantize(out_THC, self._plan, *reader.activations, seals)
            return Activations(None, tuple(codes), out_THC.dtype)
        if seals is not None:
            seal_pages(*seals)
        return Activations(out_THC.flatten(1))

    def _decoded(self, layer: int, q_THC: Tensor, *, merged: bool) -> Tensor:
        """The step's output [T, H, C], in which the decode rows are attended to."""
        if self._decode is None:
            return torch.empty_like(q_THC)
        rows = self.room.decode_rows
        attend = self._decode if merged else self._decode.unmerged
        out_BHC = attend(layer, q_THC[:rows])
        if not self.prefills:
            return out_BHC
        out_THC = torch.empty_like(q_THC)
        out_THC[:rows] = out_BHC
        return out_THC

    def _see(self, chunks: Sequence[PrefillChunk]) -> None:
        if self.room.prefill is not None:
            kv_heads = self._pages.shape.kv_heads
            batch = PrefillBatch.over(self.arrays, chunks, self._heads, kv_heads)
            self._prefill = CodedPrefillAttention(self._pages, batch)


def lay_out(
    pages: KVPages, decodes: Sequence[Span], prefills: Sequence[Span], *, heads: int
) -> QuadrantStep:
    """A step on the pages' device; `decodes` are spans of length 1, `heads` the model's query
    heads."""
    if isinstance(pages, FloatPages):
        return FloatStep(pages, decodes, prefills)
    work = CodedWork(decodes, prefills, decode_planner(pages, heads))
    step = CodedStep(pages, work.room, heads)
    step.load(work)
    return step


def _positions(spans: Sequence[Span]) -> Ints:
    if all(span.length == 1 for span in spans):
        return np.array([span.start for span in spans], np.int32)
    return np.concatenate([np.arange(span.start, span.end, dtype=np.int32) for span in spans])

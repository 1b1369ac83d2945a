"""A decode plan on the device: one run of words, one copy, and room for the partial results.

Everything a kernel reads of a plan lies at a place that only depends on the capacity, so a CUDA
graph that was captured with one plan can be replayed with another that fits: `load` the next plan
into the same buffers before the replay, or `fill` words on the host and copy them with whatever
else a step needs.

Shapes: R query rows, J tasks, C head width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.kernels.decode_attention.choose import MANY_PARTIALS, are_few, merged_class
from fourfold.kernels.decode_attention.plan import (
    TASK_CLASSES,
    TASK_FIELDS,
    TILES,
    DecodePlan,
    DecodeShape,
    class_of,
)

_ALIGNMENT = 32  # words
_HEADER = 1 + len(TILES)
_PAGE_CLASSES = tuple(16384 * 16**i for i in range(5))
# Programs of a tile beside prompts: room for so many, and for more where more rows decode.
_FEW_BESIDE, _MANY_BESIDE, _FEW_ROWS_BESIDE = 2048, 8192, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCapacity:
    """The largest plan that fits."""

    rows: int
    """Query rows."""
    tasks: tuple[tuple[int, int], ...]
    """Rows of a tile, and tasks of such tiles; best with wide tiles first."""
    pages: int
    """Entries of all page tables together, and one more."""
    merges: int
    """Partials, counted once for each query row and not for each head of it."""
    partials: int
    """Partial results, one of a query head each."""
    merged: int
    """Partials of one row, usually. More are possible."""

    @property
    def tasks_of_all(self) -> int:
        """Tasks, whatever their tiles."""
        return sum(count for _, count in self.tasks)

    def holds(self, other: PlanCapacity) -> bool:
        """Whether plans that fit another capacity fit this one."""
        tasks = dict(self.tasks)
        return (
            other.rows <= self.rows
            and all(count <= tasks.get(tile, 0) for tile, count in other.tasks)
            and other.pages <= self.pages
            and other.merges <= self.merges
            and other.partials <= self.partials
        )

    @classmethod
    def of(cls, plan: DecodePlan) -> PlanCapacity:
        """What one plan needs."""
        return cls(
            rows=len(plan.rows_R),
            tasks=plan.tiles,
            pages=len(plan.pages),
            merges=len(plan.merge_rows),
            partials=plan.partials,
            merged=plan.merged,
        )

    def are_few(self, kv_heads: int) -> bool:
        """Whether the programs of such plans are built to be few."""
        return are_few(self.rows, self.tasks, kv_heads)

    @classmethod
    def covering(cls, plan: DecodePlan, rows: int, *, beside_prompts: bool = False) -> PlanCapacity:
        """One of few capacities that hold the plan, for a batch padded to `rows` query rows.

        Numbers of tasks are rounded up generously, since a task that is not there costs next to
        nothing; and beside prompts, which take longer than that, so much that batches of usual
        lengths share a capacity, whether their rows are in many pieces or in few.
        """
        assert rows >= len(plan.rows_R)
        programs = (_FEW_BESIDE if rows <= _FEW_ROWS_BESIDE else _MANY_BESIDE) * beside_prompts
        least = programs // plan.shape.kv_heads
        return cls.of_tasks(
            plan.shape,
            rows=rows,
            tasks=tuple(
                (tile, class_of(max(count, least), TASK_CLASSES)) for tile, count in plan.tiles
            ),
            pages=class_of(len(plan.pages), _PAGE_CLASSES),
            merged=MANY_PARTIALS if beside_prompts else merged_class(plan.merged, rows),
        )

    @classmethod
    def of_tasks(
        cls,
        shape: DecodeShape,
        *,
        rows: int,
        tasks: tuple[tuple[int, int], ...],
        pages: int,
        merged: int,
    ) -> PlanCapacity:
        """With as many merges and partials as so many tasks can make."""
        pieces = sum(count * (tile // shape.shared) for tile, count in tasks)
        return cls(
            rows=rows,
            tasks=tasks,
            pages=pages,
            merges=pieces,
            partials=pieces * shape.heads,
            merged=merged,
        )


class PlanBuffers:
    """Device memory for plans of one shape within a capacity.

    `words`, int32 [`words_needed(capacity)`], and `partials`, the `partial_o` and `partial_lse` of
    buffers at least as large, may be given, so that many buffers whose launches follow each other
    share them.
    """

    def __init__(
        self,
        shape: DecodeShape,
        capacity: PlanCapacity,
        device: torch.device,
        *,
        words: Tensor | None = None,
        partials: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.shape = shape
        self.capacity = capacity
        self._sizes = _sizes(capacity)
        self._offsets = _offsets(self._sizes)
        size = self.words_needed(capacity)
        if words is None:
            words = torch.zeros(size, dtype=torch.int32, device=device)
        assert words.dtype == torch.int32
        assert words.shape == (size,)
        assert words.is_contiguous()
        assert words.data_ptr() % 16 == 0, "words of a plan begin at a multiple of 16 bytes"
        self._words = words
        if partials is None:
            partials = empty_partials(shape, capacity, device)
        self.partial_o, self.partial_lse = partials
        assert self.partial_o.shape[1:] == (shape.head_width,)
        assert len(self.partial_lse) >= capacity.partials
        assert len(self.partial_o) >= capacity.partials

    @staticmethod
    def words_needed(capacity: PlanCapacity) -> int:
        """Words of a plan on the device, and of the host's copy that `fill` writes."""
        sizes = _sizes(capacity)
        return _offsets(sizes)["pages"] + _aligned(sizes["pages"])

    @classmethod
    def holding(cls, plan: DecodePlan, device: torch.device) -> PlanBuffers:
        """Buffers that are just large enough for a plan, with the plan in them."""
        buffers = cls(plan.shape, PlanCapacity.of(plan), device)
        buffers.load(plan)
        return buffers

    def __getitem__(self, name: str) -> Tensor:
        """A part of the plan, int32: header (partials of a KV head, then tasks of each tile of the
        capacity), merge_starts, rows, tasks, merge_rows or pages."""
        return self._words[self._offsets[name] :][: self._sizes[name]]

    def fits(self, plan: DecodePlan) -> bool:
        """Whether a plan can be loaded."""
        return self.shape == plan.shape and self.capacity.holds(PlanCapacity.of(plan))

    def load(self, plan: DecodePlan) -> None:
        """Makes `plan` the one that later launches follow.

        Enqueues one copy on the current stream and does not wait. What was launched before on that
        stream still sees the plan before.
        """
        # From PyTorch's cache of pinned memory, which does not give it out again before the copy.
        staging = torch.empty(len(self._words), dtype=torch.int32, pin_memory=self._words.is_cuda)
        used = self.fill(staging.numpy(), plan)
        self._words[:used].copy_(staging[:used], non_blocking=True)

    def fill(self, words: NDArray[np.int32], plan: DecodePlan) -> int:
        """Writes a plan as the device wants it to `words`, int32 [`words_needed(capacity)`].

        Returns how many words from the first on have to be copied to the device; what lies between
        the parts, or behind those that the plan uses, may be anything.
        """
        assert self.fits(plan), "a plan beyond the capacity of its buffers"

        def put(start: int, values: NDArray[np.int32]) -> int:
            words[start : start + values.size] = values.reshape(-1)
            return start + values.size

        at = self._offsets
        counts = dict(plan.tiles)
        words[at["header"]] = plan.stride
        for i, (tile, _) in enumerate(self.capacity.tasks):
            words[at["header"] + 1 + i] = counts.get(tile, 0)
        beyond = put(at["merge_starts"], plan.merge_starts_R)
        # Rows beyond the plan have nothing to merge.
        words[beyond : at["merge_starts"] + self.capacity.rows + 1] = plan.merge_starts_R[-1]
        put(at["rows"], plan.rows_R)
        put(at["merge_rows"], plan.merge_rows)
        given, tasks_of = 0, {}
        for tile, count in plan.tiles:
            tasks_of[tile] = plan.tasks_J7[given : given + count]
            given += count
        start = at["tasks"]
        for tile, room in self.capacity.tasks:
            if tile in tasks_of:
                put(start, tasks_of[tile])
            start += room * TASK_FIELDS
        return put(at["pages"], plan.pages)


def empty_partials(
    shape: DecodeShape, capacity: PlanCapacity, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for the partial results of any plan within a capacity, and within smaller ones: means of
    values, 16 bits in whichever dtype the queries have, and base-2 logarithms of sums of weights in
    float32."""
    return (
        torch.empty(capacity.partials, shape.head_width, dtype=torch.bfloat16, device=device),
        torch.empty(capacity.partials, dtype=torch.float32, device=device),
    )


def _sizes(capacity: PlanCapacity) -> dict[str, int]:
    """Words of each part. Page tables come last: the copy ends where they do."""
    return {
        "header": _HEADER,
        "merge_starts": capacity.rows + 1,
        "rows": capacity.rows,
        "tasks": sum(count for _, count in capacity.tasks) * TASK_FIELDS,
        "merge_rows": capacity.merges,
        "pages": capacity.pages,
    }


def _offsets(sizes: dict[str, int]) -> dict[str, int]:
    offsets, end = {}, 0
    for name, words in sizes.items():
        offsets[name] = end
        end += _aligned(words)
    return offsets


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT

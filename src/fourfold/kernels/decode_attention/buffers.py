"""A decode plan on the device: one buffer, one copy, and room for the partial results.

Everything a kernel reads of a plan lies at a place that only depends on the capacity, so a CUDA
graph that was captured with one plan can be replayed with another: `load` the next plan into the
same buffers before the replay.

Shapes: R query rows, J tasks, C head width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.decode_attention.plan import TASK_FIELDS, DecodePlan, DecodeShape

_ALIGNMENT = 32  # words


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
    merged: int = 16
    """Partials of one row, usually: how many a merge reads at once. More are possible."""

    @classmethod
    def of(cls, plan: DecodePlan) -> PlanCapacity:
        """What one plan needs."""
        return cls(
            rows=len(plan.rows_R),
            tasks=plan.tiles,
            pages=len(plan.pages),
            merges=len(plan.merge_rows),
            partials=plan.partials,
            merged=int(plan.work.merged),
        )


class PlanBuffers:
    """Device memory for plans of one shape within a capacity.

    `load` replaces the plan; it enqueues one copy on the current stream and does not wait. What was
    launched before on that stream still sees the plan before.
    """

    def __init__(self, shape: DecodeShape, capacity: PlanCapacity, device: torch.device) -> None:
        self.shape = shape
        self.capacity = capacity
        parts = {
            "stride": 1,
            "merge_starts": capacity.rows + 1,
            "rows": capacity.rows,
            "merge_rows": capacity.merges,
            "tasks": sum(count for _, count in capacity.tasks) * TASK_FIELDS,
            "pages": capacity.pages,
        }
        self._offsets: dict[str, int] = {}
        size = 0
        for name, words in parts.items():
            self._offsets[name] = size
            size += -(-words // _ALIGNMENT) * _ALIGNMENT
        self._words = torch.zeros(size, dtype=torch.int32, device=device)
        self._sizes = parts
        # Means of values, in whichever 16-bit dtype the queries have.
        self.partial_o = torch.empty(
            capacity.partials, shape.head_width, dtype=torch.bfloat16, device=device
        )
        self.partial_ml = torch.empty(capacity.partials, 2, dtype=torch.float32, device=device)

    @classmethod
    def holding(cls, plan: DecodePlan, device: torch.device) -> PlanBuffers:
        """Buffers that are just large enough for a plan, with the plan in them."""
        buffers = cls(plan.shape, PlanCapacity.of(plan), device)
        buffers.load(plan)
        return buffers

    def __getitem__(self, name: str) -> Tensor:
        """A part of the plan, int32: stride, merge_starts, rows, merge_rows, tasks or pages."""
        return self._words[self._offsets[name] :][: self._sizes[name]]

    def fits(self, plan: DecodePlan) -> bool:
        """Whether a plan can be loaded."""
        room, needed = self.capacity, PlanCapacity.of(plan)
        tasks = dict(room.tasks)
        return (
            self.shape == plan.shape
            and needed.rows <= room.rows
            and all(count <= tasks.get(tile, 0) for tile, count in needed.tasks)
            and needed.pages <= room.pages
            and needed.merges <= room.merges
            and needed.partials <= room.partials
        )

    def load(self, plan: DecodePlan) -> None:
        """Makes `plan` the one that later launches follow."""
        assert self.fits(plan), "a plan beyond the capacity of its buffers"
        # From PyTorch's cache of pinned memory, which does not give it out again before the copy.
        staging = torch.empty(len(self._words), dtype=torch.int32, pin_memory=self._words.is_cuda)
        words = staging.numpy()
        self._fill(words, plan)
        self._words.copy_(staging, non_blocking=True)

    def _fill(self, words: np.ndarray[tuple[int], np.dtype[np.int32]], plan: DecodePlan) -> None:
        def put(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
            start = self._offsets[name]
            words[start : start + values.size] = values.ravel()

        words[self._offsets["stride"]] = plan.stride
        put("merge_starts", plan.merge_starts_R)
        # Rows beyond the plan have nothing to merge.
        beyond = self._offsets["merge_starts"] + len(plan.merge_starts_R)
        words[beyond : self._offsets["rows"]] = plan.merge_starts_R[-1]
        put("rows", plan.rows_R)
        put("merge_rows", plan.merge_rows)
        put("pages", plan.pages)
        start, given, tasks_of = self._offsets["tasks"], 0, {}
        for tile, count in plan.tiles:
            tasks_of[tile] = plan.tasks_J8[given : given + count]
            given += count
        for tile, room in self.capacity.tasks:
            tasks = tasks_of.get(tile, plan.tasks_J8[:0])
            words[start : start + tasks.size] = tasks.ravel()
            # A task without rows does nothing.
            words[start + tasks.size : start + room * TASK_FIELDS] = 0
            start += room * TASK_FIELDS

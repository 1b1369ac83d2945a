"""A training step as one CUDA graph: a small model's step is thousands of short kernels, and a host
launches them more slowly than a GPU computes them.

Everything that differs between steps is on the device: tokens, where documents lie, and a few
numbers of the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.train.step import MicroBatch

Step = Callable[[Sequence[MicroBatch], Tensor], tuple[Tensor, Tensor | None]]
"""From a step's micro-batches and its numbers to what it reports, all on the device."""

# Kernels are compiled and libraries take their workspaces in steps that are not captured.
_EAGER_STEPS = 2


class _Captured(NamedTuple):
    """A graph, and where it reads a step and leaves what it reports."""

    graph: torch.cuda.CUDAGraph
    micros: list[MicroBatch]
    numbers_N: Tensor
    results: tuple[Tensor, Tensor | None]


class StepGraph:
    """Takes steps as the function that it is made of. The results are overwritten by the next step,
    after whatever the device was given before it."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._eager = _EAGER_STEPS
        self._captured: _Captured | None = None

    def __call__(
        self, micros: Sequence[MicroBatch], numbers_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Micro-batches of as many rows and numbers as the first step's."""
        if self._eager:
            self._eager -= 1
            return self._step(micros, numbers_N)
        captured = self._captured
        if captured is None or _room(micros) > _room(captured.micros):
            captured = self._captured = None  # its memory is the next one's
            captured = self._captured = self._capture(micros, numbers_N)
        for mine, given in zip(captured.micros, micros, strict=True):
            _fill(mine, given)
        captured.numbers_N.copy_(numbers_N)
        captured.graph.replay()
        return captured.results

    def _capture(self, micros: Sequence[MicroBatch], numbers_N: Tensor) -> _Captured:
        """A graph with room for the documents of these micro-batches."""
        room = _room(micros)
        mine, numbers_N = [_with_room(micro, room) for micro in micros], numbers_N.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._step(mine, numbers_N)
        return _Captured(graph, mine, numbers_N, results)


def _room(micros: Sequence[MicroBatch]) -> int:
    """For beginnings of documents; 0 where every row is of one."""
    given = (micro.documents.starts_N for micro in micros)
    return max(0 if starts_N is None else len(starts_N) for starts_N in given)


def _with_room(micro: MicroBatch, room: int) -> MicroBatch:
    positions_T = micro.documents.positions_T.clone()
    starts_N = positions_T.new_empty(room, dtype=torch.int32) if room else None
    documents = dataclasses.replace(micro.documents, positions_T=positions_T, starts_N=starts_N)
    return MicroBatch(documents, micro.tokens_T.clone(), micro.target_T.clone())


def _fill(mine: MicroBatch, given: MicroBatch) -> None:
    mine.tokens_T.copy_(given.tokens_T)
    mine.target_T.copy_(given.target_T)
    mine.documents.positions_T.copy_(given.documents.positions_T)
    places_N, starts_N = mine.documents.starts_N, given.documents.starts_N
    if places_N is None:
        return
    tokens, length = len(given.tokens_T), given.documents.length
    if starts_N is None:
        starts_N = torch.arange(0, tokens, length, dtype=torch.int32, device=places_N.device)
    places_N[: len(starts_N)] = starts_N
    # Further documents begin where the last one ends.
    places_N[len(starts_N) :] = tokens

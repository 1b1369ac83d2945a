"""What a captured step finds in its place: each step's own micro-batch, whatever room it has."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fourfold.train.step import Documents, MicroBatch
from fourfold.train.step_graph import StepGraph

TOKENS = 12


def micro_batch(number: int, starts: list[int]) -> MicroBatch:
    """Two rows; without beginnings, each is of one document."""
    starts_N = torch.tensor([*starts, TOKENS], dtype=torch.int32) if starts else None
    tokens_T = torch.arange(TOKENS) + 100 * number
    documents = Documents(2, TOKENS // 2, tokens_T.int() + 1, starts_N=starts_N)
    return MicroBatch(documents, tokens_T, tokens_T + 2)


def test_every_replay_reads_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs here are the step done again on the tensors that it was captured with."""
    captured: list[tuple[Sequence[MicroBatch], Tensor]] = []
    seen: list[tuple[list[Tensor], list[list[int]], float]] = []

    def step(micros: Sequence[MicroBatch], numbers_N: Tensor) -> tuple[Tensor, Tensor | None]:
        captured.append((micros, numbers_N))
        tensors = [
            tensor.clone()
            for micro in micros
            for tensor in (micro.tokens_T, micro.target_T, micro.documents.positions_T)
        ]
        starts = [micro.documents.starts_N for micro in micros]
        bounds = [[] if each is None else sorted(set(each.tolist())) for each in starts]
        seen.append((tensors, bounds, float(numbers_N[0])))
        return numbers_N, None

    class Graph:
        def replay(self) -> None:
            step(*mine[-1])

    @contextlib.contextmanager
    def capture(graph: Graph):  # type: ignore[no-untyped-def]
        yield
        mine.append(captured[-1])
        seen.pop()

    mine: list[tuple[Sequence[MicroBatch], Tensor]] = []
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", capture)
    graph = StepGraph(step)
    whole: list[int] = []
    given = [
        [[0, 6], [0, 3, 6]],
        [whole, whole],
        [whole, whole],
        [[0, 4, 6], [0, 6]],
        [[0, 6], [0, 2, 6]],
        [[0, 1, 2, 3, 6], whole],
        [whole, whole],
    ]
    for number, starts in enumerate(given):
        micros = [micro_batch(10 * number + at, each) for at, each in enumerate(starts)]
        graph(micros, torch.tensor([float(number)]))
        tensors, bounds, numbered = seen[-1]
        wanted = [
            tensor
            for micro in micros
            for tensor in (micro.tokens_T, micro.target_T, micro.documents.positions_T)
        ]
        assert all(torch.equal(*pair) for pair in zip(tensors, wanted, strict=True))
        masked = len(mine) > 1
        assert bounds == [[*(each or [0, 6]), TOKENS] if masked or each else [] for each in starts]
        assert numbered == number
    # Once after the steps that are not captured, and again for more documents than before.
    assert len(mine) == 3

"""Steps that tell how far they are, and prompts that are sent meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from fourfold.engine.handover import sending as sending_module
from fourfold.engine.handover.pages import Prompt
from fourfold.engine.handover.sending import Computing, Courier, Route, Sending
from fourfold.engine.progress import Progress
from fourfold.quadrants.step import QuadrantStep
from fourfold.transport.format import PageFormat
from fourfold.transport.pieces import Part, Piece
from tests.cpu.engine.couple import wait_until

LAYERS, ROWS = 10, 4096
FORM = PageFormat(
    layers=LAYERS,
    kv_heads=1,
    head_width=64,
    page_tokens=64,
    code="int8",
    open_code="float32",
    record_bytes=8192,
)


class Step(QuadrantStep):
    """A step of nothing."""

    def attention(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError("nothing is computed here")


class Wire:
    """A transfer, and an outlet, of nothing."""

    record_bytes = 0

    def __init__(self) -> None:
        self.came: list[tuple[Part, int, int, int]] = []
        self.finished = False

    def write(self, pieces: Sequence[Piece]) -> None:
        self.came += [(piece.part, piece.layer, piece.first, piece.count) for piece in pieces]

    def finish(self) -> None:
        self.finished = True

    def cancel(self, left: Callable[[], None]) -> bool:
        return True

    def records(self, layers: Sequence[int], *_: object) -> list[list[memoryview]]:
        return [[memoryview(b"")] for _ in layers]

    def rows(self, layers: Sequence[int], *_: object) -> list[list[memoryview]]:
        return self.records(layers)


@pytest.fixture
def courier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Courier]:
    monkeypatch.setattr(sending_module, "_AT_ONCE", 0)
    made = Courier()
    yield made
    made.close()


def sending_of(tokens: int, wire: Wire) -> Sending:
    made = Sending(Prompt(list(range(9)), 0, tokens), LAYERS, pytest.fail)
    made.begin(Route(wire, wire, FORM, 0))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("before", [0, 2**31 - 2])
def test_marks_tell_how_far_a_step_is(before: int) -> None:
    """Also of steps whose numbers have wrapped around."""
    progress = Progress(LAYERS, torch.device("cpu"))
    progress._number[:] = before
    progress._seen[:] = before
    earlier = []
    for _ in range(3):
        step, number = Step(), progress.begin(ROWS)
        progress.mark(step, torch.from_numpy(number), ROWS)
        reached = progress.of(number, ROWS)
        assert reached is not None
        seen = []
        for layer in range(LAYERS):
            seen.append(reached())
            step.stored(layer)
        assert [*seen, reached()] == [0] * 4 + [4] * 4 + [8] * 2 + [10]
        assert all(other() == LAYERS for other in earlier)
        earlier.append(reached)


def test_steps_of_few_rows_tell_nothing() -> None:
    progress = Progress(LAYERS, torch.device("cpu"))
    step, number = Step(), progress.begin(64)
    progress.mark(step, torch.from_numpy(number), 64)
    for layer in range(LAYERS):
        step.stored(layer)
    assert progress.of(number, 64) is None
    assert not np.any(progress._seen)


def test_steps_that_tell_nothing_let_no_mark_grow_old() -> None:
    progress = Progress(LAYERS, torch.device("cpu"))
    for _ in range(3):
        progress.begin(64)
    assert progress.begin(ROWS) == 1


def test_prompts_are_sent_while_a_step_computes_them(courier: Courier) -> None:
    """Two chunks of one step, of which one is the last of its prompt."""
    wires = Wire(), Wire()
    whole, part = sending_of(130, wires[0]), sending_of(500, wires[1])
    reached = [0]
    courier.follow(Computing(lambda: reached[0], [(whole, 130), (part, 256)]))
    for layers in (0, 4, 8, 10):
        reached[0] = layers
        wait_until(lambda: [len(wire.came) for wire in wires] == [2 * reached[0], reached[0]])
        wait_until(lambda: wires[0].finished == (reached[0] == LAYERS))
    assert {piece for piece in wires[0].came if piece[0] is Part.PAGES} == {
        (Part.PAGES, layer, 0, 2) for layer in range(LAYERS)
    }
    assert wires[1].came == [(Part.PAGES, layer, 0, 4) for layer in range(LAYERS)]
    wait_until(lambda: not courier._followed)
    assert not wires[1].finished


def test_the_end_of_a_step_that_is_heard_of_late_takes_nothing_back(courier: Courier) -> None:
    wire = Wire()
    sending = sending_of(300, wire)
    courier.advance(sending, range(4), 256)  # of the second step, which is under way
    courier.advance(sending, range(LAYERS), 128)  # of the first, which was read meanwhile
    wait_until(lambda: len(wire.came) == LAYERS)
    courier.advance(sending, range(LAYERS), 300)
    wait_until(lambda: wire.finished)
    for layer in range(LAYERS):
        cuts = [
            (first, count)
            for part, of, first, count in wire.came
            if (part, of) == (Part.PAGES, layer)
        ]
        assert cuts == ([(0, 4)] if layer < 4 else [(0, 2), (2, 2)])


def test_a_step_whose_prompts_nobody_wants_is_followed_no_more(courier: Courier) -> None:
    sending = sending_of(300, Wire())
    courier.follow(Computing(lambda: 4, [(sending, 256)]))
    wait_until(lambda: bool(courier._followed))
    assert sending.cancel(lambda: None)
    wait_until(lambda: not courier._followed)

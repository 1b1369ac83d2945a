"""Prompts on their way: how much is read at once, and who may give them up when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fourfold.engine.handover.pages import STEP_BYTES, Prompt
from fourfold.engine.handover.sending import Route, Sending
from fourfold.transport.format import PageFormat
from fourfold.transport.pieces import Part, Piece

FORM = PageFormat(
    layers=48,
    kv_heads=4,
    head_width=128,
    page_tokens=64,
    code="int8",
    open_code="bfloat16",
    record_bytes=64 * 4 * 128 * 2 + 64,
)


class Wire:
    """A transfer, and an outlet, of nothing, which note what happens."""

    record_bytes = FORM.record_bytes

    def __init__(self) -> None:
        self.reads: list[int] = []
        """Records that each was of."""
        self.came: list[tuple[Part, int, int, int]] = []
        self.finished = False

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        of_pages = [piece for piece in self.came if piece[0] is Part.PAGES]
        assert sum(self.reads) == sum(count for *_, count in of_pages), "read before it was written"
        self.reads.append(len(layers) * count)
        return [[memoryview(b"")] for _ in layers]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        return [[memoryview(b"")] * 2 for _ in layers]

    def write(self, pieces: Sequence[Piece]) -> None:
        self.came += [(piece.part, piece.layer, piece.first, piece.count) for piece in pieces]

    def finish(self) -> None:
        self.finished = True


def sending_of(tokens: int, wire: Wire, found: int = 0) -> Sending:
    made = Sending(Prompt(list(range(-(-tokens // 64))), 0, tokens), FORM.layers, pytest.fail)
    made.begin(Route(wire, wire, FORM, found))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("pages", [1, 21, 22, 500, 1022, 1023, 1600])
def test_a_prompt_that_waited_is_read_in_steps(pages: int) -> None:
    """Its receiver granted pages only when all of it was computed."""
    wire, found = Wire(), pages // 3
    sending = sending_of(64 * pages + 5, wire, found)
    sending.stored(range(FORM.layers), 64 * pages + 5)
    sending.advance()
    assert max(wire.reads) * FORM.record_bytes <= STEP_BYTES
    least = -(-FORM.layers * (pages - found) * FORM.record_bytes // STEP_BYTES)
    assert least <= len(wire.reads) <= 2 * least
    assert wire.finished
    for layer in range(FORM.layers):
        came = [piece for piece in wire.came if piece[1] == layer]
        assert came.pop() == (Part.OPEN, layer, 0, 1)
        covered = [at for _, _, first, count in came for at in range(first, first + count)]
        assert covered == list(range(pages - found))


def test_pages_that_the_receiver_has_are_not_sent_while_they_are_computed() -> None:
    wire = Wire()
    sending = sending_of(64 * 100, wire, 30)
    for end in (1000, 2000, 3000, 6400):
        sending.stored(range(FORM.layers), end)
        sending.advance()
    of_first = [(first, count) for _, layer, first, count in wire.came if not layer]
    assert of_first == [(0, 1), (1, 15), (16, 54)]

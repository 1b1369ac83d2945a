"""Prompts on their way: how much is read at once, and who may give them up when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from fourfold.engine.handover.pages import STEP_BYTES, Prompt
from fourfold.engine.handover.sending import Courier, Route, Sending
from fourfold.engine.messages import SamplingParams
from fourfold.transport.format import PageFormat
from fourfold.transport.pieces import Part, Piece
from tests.cpu.driving import load_tiny, make_engine, run, submit, tokens
from tests.cpu.engine.couple import couple, prompt_of, wait_until

T = TypeVar("T")
PATIENCE = 20.0
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
        self.moments = 0
        self.at: dict[int, Callable[[], None]] = {}
        """What else happens in which of its moments, before what was asked for."""
        self.is_read = self.is_sent_from = False
        self.left: Callable[[], None] | None = None

    def moment(self) -> None:
        assert self.left is None, "it was given up"
        self.moments += 1
        self.is_read = True
        self.at.get(self.moments, lambda: None)()
        self.is_read = False

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        of_pages = [piece for piece in self.came if piece[0] is Part.PAGES]
        assert sum(self.reads) == sum(count for *_, count in of_pages), "read before it was written"
        self.moment()
        self.reads.append(len(layers) * count)
        return [[memoryview(b"")] for _ in layers]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        self.moment()
        return [[memoryview(b"")] * 2 for _ in layers]

    def write(self, pieces: Sequence[Piece]) -> None:
        self.moment()
        self.came += [(piece.part, piece.layer, piece.first, piece.count) for piece in pieces]

    def finish(self) -> None:
        self.moment()
        self.finished = True

    def cancel(self, left: Callable[[], None]) -> bool:
        assert self.left is None, "it was given up before"
        assert not self.is_read, "its pages are being read"
        self.left = left
        return not self.is_sent_from


def sending_of(
    tokens: int, wire: Wire, found: int = 0, failed: Callable[[str], None] = pytest.fail
) -> Sending:
    made = Sending(Prompt(list(range(-(-tokens // 64))), 0, tokens), FORM.layers, failed)
    made.begin(Route(wire, wire, FORM, found))  # type: ignore[arg-type]
    return made


def elsewhere(do: Callable[[], T]) -> T:
    """What it returns on another thread, which has a while for it."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(do()), daemon=True).start()
    return answers.get(timeout=PATIENCE)


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


WAITED = 64 * 64 + 5
MOMENTS = 11
"""That such a prompt takes: four times records read and written, then rows, and the end."""


@pytest.mark.parametrize("is_sent_from", [False, True])
@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
def test_who_gives_a_prompt_up_waits_for_no_read(moment: int, *, is_sent_from: bool) -> None:
    """Its pages are free when neither the read nor the transport is amid them any more."""
    wire, left = Wire(), list[int]()
    sending = sending_of(WAITED, wire)

    def give_up() -> None:
        assert not elsewhere(lambda: sending.cancel(lambda: left.append(wire.moments)))
        assert not left

    wire.at[moment], wire.is_sent_from = give_up, is_sent_from
    sending.stored(range(FORM.layers), WAITED)
    sending.advance()
    assert not sending.is_wanted
    assert wire.finished == (moment >= MOMENTS - 1)  # all has been written
    assert wire.moments <= moment + 1
    assert wire.left is not None
    if is_sent_from:
        assert not left
        wire.left()
    assert left == [wire.moments]
    sending.advance()
    assert left == [wire.moments]


@pytest.mark.parametrize("advances", [0, 1])
def test_a_prompt_that_nobody_reads_is_free_at_once(advances: int) -> None:
    wire = Wire()
    sending = sending_of(WAITED, wire)
    sending.stored(range(FORM.layers), WAITED)
    for _ in range(advances):
        sending.advance()
    assert wire.finished == advances
    assert sending.cancel(pytest.fail)
    sending.advance()
    assert wire.moments == advances * MOMENTS


def test_a_prompt_without_pages_elsewhere_is_free_at_once() -> None:
    sending = Sending(Prompt([1], 0, 60), FORM.layers, pytest.fail)
    sending.stored(range(FORM.layers), 60)
    sending.advance()
    assert sending.cancel(pytest.fail)


@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
@pytest.mark.parametrize("given_up", [False, True])
def test_a_read_that_fails_lets_go_of_the_pages(moment: int, *, given_up: bool) -> None:
    wire, left, failed = Wire(), list[None](), list[str]()
    sending = sending_of(WAITED, wire, failed=failed.append)

    def give_up() -> bool:
        return sending.cancel(lambda: left.append(None))

    def fail() -> None:
        wire.is_read = False
        if given_up:
            assert not elsewhere(give_up)
        raise RuntimeError("no memory is left")

    wire.at[moment] = fail
    courier = Courier()
    courier.advance(sending, range(FORM.layers), WAITED)
    courier.close()
    assert wire.moments == moment
    if given_up:
        assert (len(left), failed) == (1, [])
    else:
        assert failed == ["RuntimeError: no memory is left"]
        assert give_up()
        assert not left


@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
def test_a_prompt_that_fails_amid_a_read_is_read_no_further(moment: int) -> None:
    wire, failed = Wire(), list[str]()
    sending = sending_of(WAITED, wire, failed=failed.append)
    wire.at[moment] = lambda: elsewhere(lambda: sending.fail("granted twice"))
    sending.stored(range(FORM.layers), WAITED)
    sending.advance()
    assert failed == ["granted twice"]
    assert wire.moments <= moment + 1
    assert sending.cancel(pytest.fail)


def test_an_engine_goes_on_while_pages_of_a_part_that_ended_are_read(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no other owner meanwhile."""
    model = load_tiny(checkpoint("qwen3-moe-wide"))
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    gone, other = (submit(number, prompt_of(300, number), greedy) for number in (1, 2))
    wanted = tokens(run(make_engine(model), [other])[2, 0])
    with couple(make_engine(model), make_engine(model)) as pair:
        scheduler, handover = pair.first.scheduler, pair.first._handover
        assert handover is not None
        records, reading, go_on = handover._memory.records, threading.Event(), threading.Event()

        def slow(*which: object) -> list[list[memoryview]]:
            reading.set()
            assert go_on.wait(60)
            return records(*which)  # type: ignore[arg-type]

        monkeypatch.setattr(handover._memory, "records", slow)
        try:
            pair.submit(gone)
            assert reading.wait(60)
            pair.abort(1)
            pair.requests[2] = other
            pair.first.submit(other)
            with pair.changed:
                assert pair.changed.wait_for(lambda: pair.finished(other), PATIENCE)
            assert pair.tokens(2, 0) == wanted
            wait_until(lambda: scheduler.idle)
            assert scheduler.pool.in_use == 5
        finally:
            go_on.set()
        pair.wait_until_free()

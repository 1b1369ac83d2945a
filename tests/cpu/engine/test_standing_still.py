"""A peer that stands still amid pages holds up nobody else, and the pages come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fourfold.engine.engine import Engine
from fourfold.models.decoder import Decoder
from fourfold.transport import leases, session, transfers
from fourfold.transport.memory import Staging
from fourfold.transport.wire import Wire
from tests.cpu.driving import GREEDY, load_tiny, make_engine, run, submit, tokens
from tests.cpu.engine.couple import PATIENCE, Couple, couple, prompt_of, wait_until


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe-wide"))


class Stuck:
    """A thread of the transport that is amid pages, until its link ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed = False
        self.amid, self.ended = threading.Event(), threading.Event()
        shut, send, fill = Wire.shut, Wire.send, session._Payload.fill

        def end(wire: Wire) -> None:
            shut(wire)
            self.ended.set()

        def send_or_wait(wire: Wire, views: Sequence[memoryview]) -> None:
            if self.armed:
                self.wait()
            send(wire, views)

        def fill_or_wait(
            payload: session._Payload, views: Sequence[memoryview], staging: Staging
        ) -> int:
            if self.armed:
                for view in views:
                    view[:] = b"\xff" * len(view)
                self.wait()
            return fill(payload, views, staging)

        monkeypatch.setattr(Wire, "shut", end)
        self.amid_sending = lambda: monkeypatch.setattr(Wire, "send", send_or_wait)
        self.amid_filling = lambda: monkeypatch.setattr(session._Payload, "fill", fill_or_wait)
        self.give_up_after = lambda seconds: [
            monkeypatch.setattr(module, "_GRACE_SECONDS", seconds) for module in (leases, transfers)
        ]
        self.give_up_after(PATIENCE)
        monkeypatch.setattr(transfers.Transfers, "stalled", lambda self, *given: False)

    def wait(self) -> None:
        self.amid.set()
        assert self.ended.wait(PATIENCE)
        raise OSError("the link has ended")

    def let_a_part_be_stuck(self, pair: Couple, engine: Engine) -> list[int]:
        """The pages of a part that has been aborted."""
        assert pair.answers(submit(1, prompt_of(200), GREEDY))  # the link stands
        pair.wait_until_free()
        self.armed = True
        self.ended.clear()
        pair.submit(submit(2, prompt_of(200, 2), GREEDY))
        assert self.amid.wait(PATIENCE)
        part = engine.scheduler.part(2)
        assert part is not None
        pages = list(part.pages)
        for _ in range(2):
            pair.abort(2)
        return pages

    def end_of(self, pair: Couple) -> None:
        """After which service goes on as before."""
        pair.wait_until_free()
        assert self.ended.is_set()
        self.armed = False
        assert pair.answers(submit(4, prompt_of(150, 4), GREEDY))
        pair.wait_until_free()


def give_up_soon(stuck: Stuck, pair: Couple) -> None:
    stuck.give_up_after(0.0)


def cut_the_link(stuck: Stuck, pair: Couple) -> None:
    for session_of_first in list(pair.second_node._sessions.values()):
        session_of_first.close("it was cut")


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("end", [give_up_soon, cut_the_link])
def test_an_engine_whose_peer_stands_still_goes_on(
    model: Decoder,
    sends: bool,
    end: Callable[[Stuck, Couple], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages that somebody is still at have no other owner until nobody is; nobody waits for it."""
    beside = submit(3, prompt_of(200, 3), GREEDY)
    wanted = tokens(run(make_engine(model), [beside])[3, 0])
    first, second = (make_engine(model, pages=8, prefix_cache=False) for _ in range(2))
    engine = first if sends else second
    with couple(first, second) as pair:
        stuck = Stuck(monkeypatch)
        (stuck.amid_sending if sends else stuck.amid_filling)()
        pages = stuck.let_a_part_be_stuck(pair, engine)
        engine.submit(beside)
        wait_until(lambda: pair.finished(beside))
        assert pair.tokens(3, 0) == wanted
        wait_until(lambda: engine.stats.pages_in_use == len(pages))
        assert not stuck.ended.is_set()
        assert [engine.scheduler.pool.owners(page) for page in pages] == [1] * len(pages)
        end(stuck, pair)
        wait_until(lambda: not engine.scheduler.pool.in_use)
        if not sends:  # what came of them is gone
            records = engine._runner.pages.memory[0].bytes.view(first.page_format.layers, 8, -1)
            assert not records[:, pages].any()
        stuck.end_of(pair)


@pytest.mark.parametrize("sends", [True, False])
def test_an_engine_stops_while_its_peer_stands_still(
    model: Decoder, sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (make_engine(model, prefix_cache=False) for _ in range(2))
    with couple(first, second) as pair:
        stuck = Stuck(monkeypatch)
        (stuck.amid_sending if sends else stuck.amid_filling)()
        stuck.let_a_part_be_stuck(pair, first if sends else second)
    assert stuck.ended.is_set()

"""Frames that repeat, overlap, lie or stop half-way: only what is right lands, once."""

from __future__ import annotations

import contextlib
import os
import random
import threading

import pytest

from fourfold.transport import Node, Part
from fourfold.transport.control import Complete, Failed
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import WAIT_SECONDS, Memory, Outcome, make_node, until, works


def forged(receiver: Node) -> tuple[int, int, int]:
    """Duplicate, stale and corrupt frames of forgers so far."""
    (stats,) = [each for each in receiver.stats() if each.peer == "forger"]
    return stats.duplicate, stats.stale, stats.corrupt


def test_duplicates_and_any_order_across_streams(receiver: Node, forger: Forger) -> None:
    source, target, arrived = Memory(4, 25, 700).fill(1), Memory(4, 25, 700), Outcome()
    receiver.expect(1, 1, target, arrived)
    frames = [
        forger.frame(
            1, layer, first, bytes(b"".join(source.views(Part.PAGES, layer, first, 5))), count=5
        )
        for layer in range(4)
        for first in range(0, 25, 5)
    ]
    chance = random.Random(5)
    before = forged(receiver)[0]
    chance.shuffle(frames)
    for frame in frames[:-1]:
        forger.send(chance.randrange(2), frame)
        forger.send(chance.randrange(2), frame)
    until(lambda: forged(receiver)[0] - before == 19)
    assert arrived.calls == []
    forger.send(0, frames[-1])
    assert arrived.wait() is None
    assert forger.hear() == Complete(1)
    assert target.content() == source.content()
    # The owner may use its pages now: what comes late must not be written.
    target.fill(2)
    expected, before = target.content(), forged(receiver)[1]
    for frame in frames:
        forger.send(1, frame)
    until(lambda: forged(receiver)[1] - before == 20)
    assert target.content() == expected
    receiver.forget(1)


def test_an_altered_payload_fails_its_lease(receiver: Node, forger: Forger) -> None:
    arrived, other, target = Outcome(), Outcome(), Memory(1, 2, 700)
    receiver.expect(1, 1, Memory(1, 2, 700), arrived)
    receiver.expect(2, 1, target, other)
    before = forged(receiver)[2]
    forger.send(0, forger.frame(1, 0, 0, os.urandom(700), checksum=5))
    assert "checksum" in arrived.failure()
    message = forger.hear()
    assert isinstance(message, Failed)
    assert message.lease == 1
    assert "checksum" in message.reason
    assert forged(receiver)[2] - before == 1
    good = Memory(1, 2, 700).fill(3)
    forger.send(0, forger.frame(2, 0, 0, bytes(good.buffer), count=2))
    assert other.wait() is None
    assert target.content() == good.content()
    for lease in (1, 2):
        receiver.forget(lease)


def test_of_an_altered_payload_nothing_lands_in_scattered_pages() -> None:
    """Where streams bring pieces together, they look at them before they write any."""
    receiver = make_node("decode", 2, streams=4)
    forger = Forger(receiver.peer)
    arrived, target = Outcome(), Memory(1, 8, 4096).shuffle(1)
    receiver.expect(1, 1, target, arrived)
    forger.send(0, forger.frame(1, 0, 0, os.urandom(8 * 4096), count=8, checksum=5))
    assert "checksum" in arrived.failure()
    assert not any(target.buffer)
    forger.close()
    receiver.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"first": 0, "count": 2}, {"first": 1, "count": 2}),
        ({"first": 0, "count": 1}, {"first": 0, "count": 1, "offset": 0, "size": 200}),
        (
            {"first": 0, "count": 1, "offset": 0, "size": 100},
            {"first": 0, "count": 1, "offset": 30, "size": 100},
        ),
    ],
)
def test_pages_cut_in_two_ways_fail(
    receiver: Node, forger: Forger, first: dict[str, int], second: dict[str, int]
) -> None:
    arrived = Outcome()
    receiver.expect(1, None, Memory(1, 4, 100), arrived)
    for change in (first, second):
        length = 50 if change.get("size") == 100 else 100 * change["count"]
        forger.send(0, forger.frame(1, 0, change.pop("first"), bytes(length), **change))
    assert "in" in arrived.failure()
    receiver.forget(1)


def test_parts_of_a_page_in_any_order(receiver: Node, forger: Forger) -> None:
    source, target, arrived = Memory(1, 2, 1000).fill(4), Memory(1, 2, 1000), Outcome()
    receiver.expect(1, None, target, arrived)
    parts = [(page, offset) for page in range(2) for offset in (0, 300, 600, 900)]
    random.Random(3).shuffle(parts)
    for page, offset in [*parts[:-1], parts[0], *parts[-1:]]:
        data = bytes(source.page(0, page)[offset : offset + 300])
        forger.send(0, forger.frame(1, 0, page, data, offset=offset, size=1000))
    assert arrived.wait() is None
    assert target.content() == source.content()
    receiver.forget(1)


def test_frames_for_another_incarnation_are_dropped(receiver: Node, forger: Forger) -> None:
    target, arrived = Memory(1, 1, 700), Outcome()
    receiver.expect(1, None, target, arrived)
    before = forged(receiver)[1]
    forger.send(0, forger.frame(1, 0, 0, os.urandom(700), epoch=receiver.peer.epoch + 1))
    until(lambda: forged(receiver)[1] - before == 1)
    assert not any(target.buffer)
    forger.send(0, forger.frame(1, 0, 0, bytes(700)))
    assert arrived.wait() is None
    receiver.forget(1)


def test_two_links_do_not_write_one_lease(receiver: Node, forger: Forger) -> None:
    target, arrived = Memory(1, 2, 100), Outcome()
    receiver.expect(1, None, target, arrived)
    forger.send(0, forger.frame(1, 0, 0, b"a" * 100))
    until(lambda: any(target.buffer))
    rival = Forger(receiver.peer, epoch=3)
    rival.send(0, rival.frame(1, 0, 1, b"b" * 100))
    assert isinstance(rival.hear(), Failed)
    forger.send(0, forger.frame(1, 0, 1, b"a" * 100))
    assert arrived.wait() is None
    assert bytes(target.buffer) == b"a" * 200
    rival.close()
    receiver.forget(1)


def test_pages_taken_back_amid_a_frame_are_not_written(receiver: Node, forger: Forger) -> None:
    """The sender stands still in the middle of a page; its receiver does not wait for it, but is
    told when nobody writes into the page any more."""
    target, arrived = Memory(1, 1, 1 << 20), Outcome()
    receiver.expect(1, None, target, arrived)
    frame = forger.frame(1, 0, 0, b"x" * (1 << 20))
    forger.send(0, frame[: 1 << 19])
    until(lambda: any(target.buffer[:1000]))
    left = threading.Event()
    assert not receiver.forget(1, left.set)
    assert left.wait(WAIT_SECONDS)
    target.buffer[:] = bytes(1 << 20)
    forger.wait_until_closed()
    with contextlib.suppress(OSError):
        forger.send(0, frame[1 << 19 :])
    assert not any(target.buffer)
    assert arrived.calls == []
    works(receiver)


def test_a_link_that_ends_fails_what_it_began(receiver: Node, forger: Forger) -> None:
    begun, other = Outcome(), Outcome()
    receiver.expect(1, None, Memory(1, 2, 100), begun)
    receiver.expect(2, None, Memory(1, 2, 100), other)
    forger.send(0, forger.frame(1, 0, 0, bytes(100))[:120])
    until(lambda: receiver.stats())
    forger.streams[0].shut()
    assert "link from forger ended" in begun.failure()
    assert other.calls == []
    for lease in (1, 2):
        receiver.forget(lease)

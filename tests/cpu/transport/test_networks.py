"""Connections that break, fall silent, change bytes or are not there: each side learns it soon,
and service goes on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import msgspec
import pytest

from fourfold.transport import Node, Part, Peer
from fourfold.transport.control import Exposed, Joined
from fourfold.transport.handshake import Purpose
from fourfold.transport.session import Session
from fourfold.transport.ways import Ways
from tests.cpu.transport.nodes import WAIT_SECONDS, Memory, Outcome, make_node, send, until
from tests.cpu.transport.proxy import Bottleneck, Proxy, opens

QUICK = {"stall_seconds": 2.0}

Network = tuple[Node, Node, Proxy]


@contextlib.contextmanager
def network(**options: object) -> Iterator[Network]:
    """A sender, a receiver and what is between them."""
    sender, receiver = make_node("prefill", 1, **options), make_node("decode", 2, **options)
    proxy = Proxy(receiver.peer)
    yield sender, receiver, proxy
    proxy.close()
    sender.close()
    receiver.close()


@pytest.fixture
def patient() -> Iterator[Network]:
    with network() as made:
        yield made


def start(
    sender: Node, receiver: Node, proxy: Proxy, source: Memory
) -> tuple[Memory, Outcome, Outcome]:
    """Begins to send all but the last page through a proxy."""
    target, arrived, sent = Memory(2, 20, 5000), Outcome(), Outcome()
    receiver.expect(1, None, target, arrived)
    transfer = sender.link(proxy.peer).begin(1, sent)
    pieces = list(source.pieces(5))
    transfer.write(pieces[:-1])
    until(lambda: any(target.buffer) or sent.calls)
    assert sent.calls == []
    return target, arrived, sent


def test_a_connection_that_is_cut(patient: Network) -> None:
    sender, receiver, proxy = patient
    _, arrived, sent = start(sender, receiver, proxy, Memory(2, 20, 5000).fill(1))
    proxy.cut()
    assert "link to decode broke" in sent.failure()
    assert "link from prefill ended" in arrived.failure()
    receiver.forget(1)
    again, target, source = Outcome(), Memory(2, 20, 5000), Memory(2, 20, 5000).fill(3)
    receiver.expect(1, None, target, again)
    outcome = Outcome()
    transfer = sender.link(proxy.peer).begin(1, outcome)  # a new link
    transfer.write(list(source.pieces()))
    transfer.finish()
    assert outcome.wait() is None
    assert again.wait() is None
    assert target.content() == source.content()
    (stats,) = sender.stats()
    assert stats.links == 2
    assert stats.failed == 1
    assert [len(each.calls) for each in (arrived, sent, again, outcome)] == [1, 1, 1, 1]


def test_a_peer_that_falls_silent() -> None:
    """Connections stay open and nothing comes: both sides find out without sending anything."""
    with network(**QUICK) as (sender, receiver, proxy):
        _, arrived, sent = start(sender, receiver, proxy, Memory(2, 20, 5000).fill(1))
        proxy.freeze()
        assert "silent for 2 s" in sent.failure()
        assert "silent for 2 s" in arrived.failure()


def test_who_cancels_amid_a_frame_does_not_wait_for_a_peer_that_stands_still(
    patient: Network,
) -> None:
    sender, receiver, proxy = patient
    start(sender, receiver, proxy, Memory(2, 20, 5000).fill(1))
    proxy.freeze()
    link, sent, left = sender.link(proxy.peer), Outcome(), threading.Event()
    transfer = link.begin(2, sent)
    transfer.write(list(Memory(4, 200, 1 << 16).pieces(32)))

    def stands_still() -> bool:
        before = transfer.queued
        time.sleep(0.5)
        return transfer.sending > 0 and transfer.queued == before

    until(stands_still)
    assert not transfer.cancel(left.set)
    assert link.broken is None
    assert left.wait(WAIT_SECONDS)
    assert not transfer.sending
    assert "stood still amid pages of a transfer that was cancelled" in str(link.broken)
    assert not sent.calls


def test_bytes_that_change_on_their_way(patient: Network) -> None:
    sender, receiver, proxy = patient
    marker = b"this is what the first page holds"
    source = Memory(2, 20, 5000).fill(1)
    source.page(0, 3)[: len(marker)] = marker
    proxy.alter = lambda data: data.replace(marker[:16], marker[:15] + b"X")
    target, arrived, sent = Memory(2, 20, 5000), Outcome(), Outcome()
    receiver.expect(1, None, target, arrived)
    transfer = sender.link(proxy.peer).begin(1, sent)
    transfer.write(list(source.pieces()))
    transfer.finish()
    for outcome in (sent, arrived):
        assert "checksum" in outcome.failure()
    (stats,) = receiver.stats()
    assert stats.corrupt == 1


def test_a_message_that_changes_on_its_way_is_not_heard(patient: Network) -> None:
    """Otherwise one lease would be taken for complete in place of another."""
    sender, receiver, proxy = patient
    proxy.alter_back = lambda data: data.replace(b"\xa5lease\x03", b"\xa5lease\x01")
    link, outcomes = sender.link(proxy.peer), {}
    for lease in (1, 3):
        arrived, sent = Outcome(), Outcome()
        target = Memory(1, 2, 100)
        receiver.expect(lease, None, target, arrived)
        transfer = link.begin(lease, sent)
        pieces = list(Memory(1, 2, 100).fill(lease).pieces(1))
        transfer.write(pieces if lease == 3 else pieces[:1])
        outcomes[lease] = arrived, sent
        # Before the link ends: a lease of which nothing has come belongs to none.
        until(functools.partial(any, target.buffer))
    assert outcomes[3][0].wait() is None  # which the sender is told, but for one bit
    for outcome in (outcomes[1][0], outcomes[1][1], outcomes[3][1]):
        assert "link" in outcome.failure()


def sends_a_page(sender: Node, receiver: Node, peer: Peer) -> None:
    """By the link to a peer, to which nothing was sent before."""
    source, target, arrived, sent = Memory(1, 1, 99).fill(1), Memory(1, 1, 99), Outcome(), Outcome()
    receiver.expect(1, None, target, arrived)
    transfer = sender.link(peer).begin(1, sent)
    transfer.write(list(source.pieces()))
    transfer.finish()
    assert sent.wait() is None
    assert arrived.wait() is None
    assert target.content() == source.content()
    (stats,) = sender.stats()
    assert (stats.links, stats.failed) == (1, 0)


@pytest.mark.parametrize(("purpose", "seconds"), [(Purpose.LINK, 2.5), (Purpose.STREAM, 0.8)])
def test_connections_that_take_long_to_open_are_no_stall(purpose: Purpose, seconds: float) -> None:
    """The first, or all streams together: longer than anything may stand still or be silent."""

    def slow(data: bytes) -> bytes:
        if opens(data, purpose):
            time.sleep(seconds)
        return data

    with network(streams=4, **QUICK) as (sender, receiver, proxy):
        proxy.alter = slow
        sends_a_page(sender, receiver, proxy.peer)


@contextlib.contextmanager
def asked_to_join(answer: Callable[[], None]) -> Iterator[None]:
    """The next link offers memory for RDMA, which its receiver declines after `answer`."""

    def join(session: Session, exposed: Exposed) -> Joined:
        answer()
        return Joined([], "it has no NIXL")

    offers = itertools.chain([Exposed(agent=b"", checksum=0, regions=[])], itertools.repeat(None))
    with (
        mock.patch.object(Ways, "offer", side_effect=offers),
        mock.patch.object(Session, "_join", join),
    ):
        yield


def test_a_peer_that_takes_long_to_answer_an_offer_is_no_stall() -> None:
    with network(**QUICK) as (sender, receiver, _), asked_to_join(lambda: time.sleep(3.0)):
        sends_a_page(sender, receiver, receiver.peer)


def test_a_link_that_does_not_come_to_stand_is_given_up() -> None:
    """Its peer answers every heartbeat; the next link stands."""
    answers = threading.Event()
    with (
        network(stand_seconds=2.0) as (sender, receiver, _),
        asked_to_join(lambda: until(answers.is_set)),
    ):
        first = sender.link(receiver.peer)
        waiting = Outcome()
        first.begin(7, waiting)
        assert "it did not come to stand within 2 s" in waiting.failure()
        answers.set()
        first.join(WAIT_SECONDS)
        assert sender.link(receiver.peer) is not first
        source, target, arrived = Memory(1, 1, 99).fill(1), Memory(1, 1, 99), Outcome()
        receiver.expect(1, None, target, arrived)
        assert send(sender, receiver, 1, source)[1].wait() is None
        assert arrived.wait() is None
        assert len(waiting.calls) == 1


def test_a_link_that_stands_goes_on_after_its_time_to_stand() -> None:
    with network(stand_seconds=2.0, **QUICK) as (sender, receiver, _):
        sends_a_page(sender, receiver, receiver.peer)
        time.sleep(3.5)
        source, target, arrived = Memory(1, 1, 99).fill(2), Memory(1, 1, 99), Outcome()
        receiver.expect(2, None, target, arrived)
        assert send(sender, receiver, 2, source)[1].wait() is None
        assert arrived.wait() is None
        (stats,) = sender.stats()
        assert (stats.links, stats.failed) == (1, 0)


def test_a_slow_network_is_no_stall_while_the_link_is_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its streams send a frame each, and share what there is: nothing comes for long, then all. It
    takes longer than a link may to stand, but moves."""
    monkeypatch.setattr("fourfold.transport.self_test.PROBE_FRAMES", 8)
    options = {"streams": 8, "slice_bytes": 1 << 19, "stand_seconds": 2.0, **QUICK}
    with network(**options) as (sender, receiver, proxy):
        proxy.alter = Bottleneck(8 * (1 << 19) / 3.2)
        sends_a_page(sender, receiver, proxy.peer)


def test_a_frame_that_is_long_on_its_way_is_no_stall() -> None:
    """All that is sent is one, and it comes only after longer than anything may stand still."""
    size = 1 << 22
    with network(streams=1, slice_bytes=size, **QUICK) as (sender, receiver, proxy):
        sends_a_page(sender, receiver, proxy.peer)
        source, target = Memory(1, 4, size // 4).fill(2), Memory(1, 4, size // 4)
        arrived, sent = Outcome(), Outcome()
        receiver.expect(2, None, target, arrived)
        proxy.alter = Bottleneck(size / 3.5)
        transfer = sender.link(proxy.peer).begin(2, sent)
        transfer.write(list(source.pieces()))
        transfer.finish()
        assert sent.wait() is None
        assert arrived.wait() is None
        assert target.content() == source.content()
        (stats,) = receiver.stats()
        assert stats.frames == 2


def test_a_receiver_that_takes_nothing_bounds_what_is_sent() -> None:
    """The landing blocks: no more than the window leaves the sender, whose transfer then fails."""
    sender = make_node(
        "prefill", 1, window_bytes=4 << 20, max_payload=1 << 20, slice_bytes=1 << 20, **QUICK
    )
    receiver = make_node(
        "decode", 2, window_bytes=4 << 20, max_payload=1 << 20, slice_bytes=1 << 20, **QUICK
    )
    gone = Outcome()

    class Slow(Memory):
        def views(self, part: Part, layer: int, first: int, count: int) -> list[memoryview]:
            gone.wait()
            return list(super().views(part, layer, first, count))

    source, target, arrived = Memory(1, 512, 1 << 16), Slow(1, 512, 1 << 16), Outcome()
    receiver.expect(1, None, target, arrived)
    _, sent = send(sender, receiver, 1, source)
    assert "nothing has moved" in sent.failure()
    (stats,) = sender.stats()
    assert stats.bytes <= (4 << 20) + 2 * (1 << 20)
    gone(None)
    arrived.failure()
    sender.close()
    receiver.close()


def test_nobody_listens() -> None:
    sender, receiver = make_node("prefill", 1), make_node("decode", 2)
    receiver.close()
    _, sent = send(sender, receiver, 1, Memory(1, 1, 10))
    assert "cannot be reached at 127.0.0.1" in sent.failure()
    sender.close()


def test_an_address_that_is_none() -> None:
    """A peer says where it is, and may say anything; a thread that failed would end the worker."""
    sender, done = make_node("prefill"), Outcome()
    failed: list[object] = []
    with mock.patch.object(threading, "excepthook", failed.append):
        peer = msgspec.structs.replace(sender.peer, name="decode", epoch=2, host="gpu..1")
        link = sender.link(peer)
        link.begin(1, done)
        assert "'gpu..1' is no name of a host" in done.failure()
        link.join(WAIT_SECONDS)
    sender.close()
    assert not failed


def test_another_incarnation_answers() -> None:
    sender, receiver = make_node("prefill", 1), make_node("decode", 2)
    before = msgspec.structs.replace(receiver.peer, epoch=99)
    sent = Outcome()
    sender.link(before).begin(1, sent)
    assert "epoch 2 answers instead of epoch 99" in sent.failure()
    sender.close()
    receiver.close()

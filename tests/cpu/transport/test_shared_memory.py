"""Memory that peers share: what may be mapped, what is read from it, and what else is used."""

from __future__ import annotations

import os
import time
from collections import Counter

import msgspec
import pytest

from fourfold.transport import Node, SharedRegion, TransportPath
from fourfold.transport.control import Mapped, Offer, Region
from fourfold.transport.cutting import Slice
from fourfold.transport.frames import Extent, Kind, encode_extents
from fourfold.transport.transfers import Transfer, Transfers
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import Memory, Outcome, make_node, send


def test_shared_memory_that_is_not_there_closes_the_link(receiver: Node, forger: Forger) -> None:
    extents = encode_extents([Extent(region=0, length=100, offset=0)])
    receiver.expect(1, None, Memory(1, 1, 100), Outcome())
    frame = forger.frame(1, 0, 0, bytes(100), kind=Kind.DESCRIBED, extents=1)
    forger.send(0, frame[:64] + extents)
    forger.wait_until_closed()
    receiver.forget(1)


def test_what_is_no_shared_memory_is_not_mapped(receiver: Node, forger: Forger) -> None:
    """Another process, a pipe, a file that can shrink, and memory of another size."""
    region = SharedRegion(1 << 16)
    assert region.descriptor is not None
    right = Region(
        number=0,
        process=os.getpid(),
        descriptor=region.descriptor,
        inode=os.fstat(region.descriptor).st_ino,
        size=1 << 16,
    )
    reader, writer = os.pipe()
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 1 << 16)
    for change in (
        {"process": 2**22 + 1},
        {"descriptor": reader},
        {"descriptor": unsealed, "inode": os.fstat(unsealed).st_ino},
        {"size": 1 << 17},
        {"inode": 1},
    ):
        forger.say(Offer([msgspec.structs.replace(right, **change)]))
        message = forger.hear()
        assert isinstance(message, Mapped)
        assert message.regions == []
        assert "namespace of processes" in message.refusal or "no memory" in message.refusal
    forger.say(Offer([right]))
    assert forger.hear() == Mapped([0], "")
    region.buffer[:100] = b"z" * 100
    target, arrived = Memory(1, 1, 100), Outcome()
    receiver.expect(1, None, target, arrived)
    frame = forger.frame(1, 0, 0, b"z" * 100, kind=Kind.DESCRIBED, extents=1)[:64]
    forger.send(0, frame + encode_extents([Extent(region=0, length=100, offset=0)]))
    assert arrived.wait() is None
    assert bytes(target.buffer) == b"z" * 100
    receiver.forget(1)
    # Beyond its end there is nothing to read.
    forger.send(0, frame + encode_extents([Extent(region=0, length=100, offset=(1 << 16) - 99)]))
    forger.wait_until_closed()
    for descriptor in (reader, writer, unsealed):
        os.close(descriptor)


def test_memory_used_again_before_it_was_read_is_noticed(receiver: Node, forger: Forger) -> None:
    region = SharedRegion(1 << 16)
    assert region.descriptor is not None
    inode = os.fstat(region.descriptor).st_ino
    forger.say(
        Offer(
            [
                Region(
                    number=3,
                    process=os.getpid(),
                    descriptor=region.descriptor,
                    inode=inode,
                    size=1 << 16,
                )
            ]
        )
    )
    assert forger.hear() == Mapped([3], "")
    arrived = Outcome()
    receiver.expect(1, None, Memory(1, 1, 100), arrived)
    frame = forger.frame(1, 0, 0, b"z" * 100, kind=Kind.DESCRIBED, extents=1)[:64]
    forger.send(0, frame + encode_extents([Extent(region=3, length=100, offset=0)]))
    assert "checksum" in arrived.failure()
    receiver.forget(1)


def test_a_path_that_is_not_there_is_refused_or_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The receiver was told to use TCP; the sender would share its memory."""
    receiver = make_node("decode", 2, path=TransportPath.TCP)
    for path, path_name in ((TransportPath.SHARED_MEMORY, ""), (TransportPath.AUTO, "tcp x2")):
        sender = make_node("prefill", 1, path=path)
        region = SharedRegion(1000)
        sender.register(region)
        target, arrived = Memory(1, 1, 1000), Outcome()
        receiver.expect(1, None, target, arrived)
        caplog.clear()
        source = Memory(1, 1, 1000, 0, region.buffer).fill(1)
        _, sent = send(sender, receiver, 1, source)
        if path is TransportPath.AUTO:
            assert sent.wait() is None
            assert target.content() == source.content()
            assert "though it is on this host" in caplog.text
        else:
            assert "shared memory was asked for" in sent.failure()
        assert sender.stats()[0].path == path_name
        receiver.forget(1)
        sender.close()
    receiver.close()


@pytest.mark.parametrize("shares", [True, False])
def test_streams_take_turns_where_they_only_say_where_pages_lie(
    shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Counter[int] = Counter()
    take = Transfers.take

    def count(transfers: Transfers, stream: int) -> Slice[Transfer] | None:
        frame = take(transfers, stream)
        if frame is not None:
            taken[stream] += 1
            if stream == 0:
                time.sleep(0.01)  # it is slow
        return frame

    monkeypatch.setattr(Transfers, "take", count)
    receiver, sender = (
        make_node(*who, slice_bytes=1000) for who in (("decode", 2), ("prefill", 1))
    )
    region = SharedRegion(64 * 1000)
    if shares:
        sender.register(region)
    target, arrived = Memory(1, 64, 1000), Outcome()
    receiver.expect(1, None, target, arrived)
    source = Memory(1, 64, 1000, 0, region.buffer if shares else None).fill(1)
    _, sent = send(sender, receiver, 1, source)
    assert sent.wait() is arrived.wait() is None
    assert target.content() == source.content()
    assert (abs(taken[0] - taken[1]) <= 2) == shares
    receiver.forget(1)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("path", [TransportPath.AUTO, TransportPath.SHARED_MEMORY])
@pytest.mark.parametrize("shares", [True, False])
def test_what_lies_outside_of_shared_memory_goes_over_tcp(
    path: TransportPath, shares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies, and where pages of a GPU lie: whatever was asked for, they must arrive."""
    receiver, sender = make_node("decode", 2), make_node("prefill", 1, path=path)
    if shares:
        sender.register(SharedRegion(1000))
    target, arrived = Memory(1, 1, 1000), Outcome()
    receiver.expect(1, None, target, arrived)
    source = Memory(1, 1, 1000).fill(1)
    _, sent = send(sender, receiver, 1, source)
    assert sent.wait() is arrived.wait() is None
    assert target.content() == source.content()
    for node in (sender, receiver):
        (stats,) = node.stats()
        assert (stats.path, stats.bytes) == ("tcp x2", 1000)
    asked = path is TransportPath.SHARED_MEMORY
    assert ("no memory of this worker can be shared" in caplog.text) == (asked and not shares)
    receiver.forget(1)
    sender.close()
    receiver.close()

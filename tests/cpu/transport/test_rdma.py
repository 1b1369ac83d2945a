"""Memory that is read over RDMA: who gets it, what is read from it, and owners that stop or die."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from fourfold.errors import ConfigError
from fourfold.transport import Node, SharedRegion, TransportPath, nixl
from fourfold.transport.control import Exposed, ExposedRegion, Joined, Ping
from fourfold.transport.envelope import HEAD_BYTES
from fourfold.transport.frames import Extent, Kind, encode_extents
from fourfold.transport.rdma import Exposure
from tests.cpu.transport import owner
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import (
    Memory,
    Outcome,
    forget,
    make_node,
    needs_nixl,
    send,
    until,
    works,
)
from tests.cpu.transport.proxy import Proxy

SIZE = 1 << 16


@pytest.fixture(autouse=True)
def by_software(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX may use TCP, where the owner answers each READ."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def reader() -> Iterator[Node]:
    node = make_node("decode", 2, path=TransportPath.RDMA)
    yield node
    node.close()


@pytest.fixture
def liar(reader: Node) -> Iterator[Forger]:
    """Linked to `reader`."""
    peer = Forger(reader.peer)
    yield peer
    peer.close()


def describe(liar: Forger, lease: int, data: bytes, *extents: Extent) -> None:
    """Sends a frame that says that page 0 of a lease lies in those pieces, and holds `data`."""
    head = liar.frame(lease, 0, 0, data, kind=Kind.DESCRIBED, extents=len(extents))[:64]
    liar.send(0, head + encode_extents(extents))


def part_of(region: int, offset: int, length: int) -> Extent:
    return Extent(region=region, length=length, offset=offset)


# What is refused, and says what would help


def test_without_nixl_rdma_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fourfold\[rdma\]'"):
        make_node("prefill", path=TransportPath.RDMA)


@needs_nixl
def test_without_a_device_rdma_is_refused_unless_software_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl, "devices", list)
    monkeypatch.delenv("UCX_TLS")
    with pytest.raises(ConfigError, match=r"no RDMA device .* --transport auto .* UCX_TLS=tcp"):
        make_node("prefill", path=TransportPath.RDMA)


@needs_nixl
@pytest.mark.parametrize("transports", ["tcp", "rc,tcp", "all", "^cma"])
def test_ucx_does_not_listen_beyond_the_loopback(
    monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    with pytest.raises(ConfigError, match="leave tcp out of UCX_TLS"):
        make_node("prefill", path=TransportPath.RDMA, host="0.0.0.0", key=bytes(16))


def test_nothing_but_a_device_makes_auto_choose_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    for devices, transports in (([], "tcp"), ([], None), (["mlx5_0"], "tcp")):
        monkeypatch.setattr(nixl, "devices", lambda found=devices: found)
        monkeypatch.delenv("UCX_TLS", raising=False)
        if transports is not None:
            monkeypatch.setenv("UCX_TLS", transports)
        node = make_node("prefill")
        assert not node.peer.rdma
        node.close()


def test_auto_warns_of_a_device_that_it_cannot_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nixl, "devices", lambda: ["mlx5_0"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("UCX_TLS")
    sender, receiver = make_node("prefill"), make_node("decode", 2)
    elsewhere = msgspec.structs.replace(receiver.peer, host_id="another machine")
    sender.link(elsewhere)
    until(lambda: "go over TCP though this machine has RDMA (mlx5_0)" in caplog.text)
    assert caplog.text.count("pip install 'fourfold[rdma]'") == 1
    sender.close()
    receiver.close()


@needs_nixl
@pytest.mark.parametrize("path", [TransportPath.AUTO, TransportPath.TCP])
def test_a_peer_without_rdma_is_named(path: TransportPath) -> None:
    sender = make_node("prefill", path=TransportPath.RDMA)
    receiver = make_node("decode", 2, path=path)
    sender.register(SharedRegion(SIZE))
    _, sent = send(sender, receiver, 1, Memory(1, 1, 10))
    assert "decode reads nothing by it" in sent.failure()
    assert "pip install 'fourfold[rdma]'" in sent.failure()
    sender.close()
    receiver.close()


@needs_nixl
@pytest.mark.parametrize("registers", [True, False])
def test_what_is_not_registered_goes_over_tcp(
    registers: bool, reader: Node, caplog: pytest.LogCaptureFixture
) -> None:
    sender = make_node("prefill", path=TransportPath.RDMA)
    if registers:
        sender.register(SharedRegion(SIZE))
    source, target, arrived = Memory(1, 1, 10).fill(1), Memory(1, 1, 10), Outcome()
    reader.expect(1, None, target, arrived)
    _, sent = send(sender, reader, 1, source)
    assert sent.wait() is arrived.wait() is None
    assert target.content() == source.content()
    assert sender.stats()[0].path == "tcp x2"
    warned = "no memory of this worker is registered for it" in caplog.text
    assert warned != registers
    reader.forget(1)
    sender.close()


@needs_nixl
def test_regions_that_are_registered_later_are_read_too(reader: Node) -> None:
    sender = make_node("prefill", path=TransportPath.RDMA)
    for lease in (1, 2):
        region = SharedRegion(SIZE)
        sender.register(region)
        source = Memory(1, 4, SIZE // 4, 0, region.buffer).fill(lease)
        target, arrived = Memory(1, 4, SIZE // 4), Outcome()
        reader.expect(lease, None, target, arrived)
        link = sender.link(reader.peer)
        until(lambda number=lease - 1, link=link: number in link._ways.readable)
        _, sent = send(sender, reader, lease, source)
        assert sent.wait() is arrived.wait() is None
        assert target.content() == source.content()
        reader.forget(lease)
    assert sender.stats()[0].links == 1
    sender.close()


def test_a_node_without_rdma_joins_nothing(receiver: Node, forger: Forger) -> None:
    forger.say(Exposed(agent=b"", checksum=0, regions=[]))
    assert forger.hear() == Joined([], "decode was not started with --transport rdma")
    assert not receiver.peer.rdma


# What peers say that is not so


@needs_nixl
def test_what_was_altered_on_its_way_is_not_given_to_nixl(reader: Node, liar: Forger) -> None:
    exposure = Exposure("liar", "127.0.0.1")
    offer = exposure.offer()
    altered = bytes([offer.agent[0] ^ 1]) + offer.agent[1:]
    liar.say(msgspec.structs.replace(offer, agent=altered))
    answer = liar.hear()
    assert isinstance(answer, Joined)
    assert answer.regions == []
    assert "altered on its way" in answer.refusal
    liar.say(offer)  # as it was made
    assert liar.hear() == Joined([], "")
    exposure.close()


@needs_nixl
def test_a_peer_that_offers_its_memory_again_and_again_is_given_up(liar: Forger) -> None:
    for _ in range(65):
        liar.say(Exposed(agent=b"", checksum=0, regions=[]))
    liar.wait_until_closed()


@needs_nixl
@pytest.mark.parametrize(
    ("extent", "why"),
    [
        (part_of(5, 0, 100), "outside of the exposed region 5"),
        (part_of(0, SIZE - 99, 100), "outside of the exposed region 0"),
        (part_of(1, 0, 100), "its memory is not what it said"),
    ],
)
def test_a_frame_about_memory_that_is_not_there_ends_its_link(
    reader: Node,
    liar: Forger,
    caplog: pytest.LogCaptureFixture,
    extent: Extent,
    why: str,
) -> None:
    """A region that was not offered, one that is shorter, one that NIXL knows nothing of."""
    exposure, region = Exposure("liar", "127.0.0.1"), SharedRegion(SIZE)
    exposure.add(0, region)
    offer = exposure.offer()
    nowhere = ExposedRegion(number=1, address=4096, size=SIZE)
    liar.say(msgspec.structs.replace(offer, regions=[*offer.regions, nowhere]))
    assert liar.hear() == Joined([0, 1], "")
    target, arrived = Memory(1, 2, 100), Outcome()
    reader.expect(1, None, target, arrived)
    region.buffer[:100] = b"z" * 100
    head = liar.frame(1, 0, 1, b"z" * 100, kind=Kind.DESCRIBED, extents=1)[:64]
    liar.send(0, head + encode_extents([part_of(0, 0, 100)]))
    until(lambda: bytes(target.buffer[100:]) == b"z" * 100)
    describe(liar, 1, b"z" * 100, extent)
    liar.wait_until_closed()
    assert "the link from forger ended" in arrived.failure()
    until(lambda: why in caplog.text)
    assert not any(target.buffer[:100])
    reader.forget(1)
    works(reader)
    exposure.close()


@needs_nixl
@pytest.mark.parametrize(("address", "size"), [(-1, SIZE), ((1 << 64) - 50, 100), (4096, 0)])
def test_memory_that_cannot_be_is_refused(liar: Forger, address: int, size: int) -> None:
    exposure = Exposure("liar", "127.0.0.1")
    region = ExposedRegion(number=3, address=address, size=size)
    liar.say(msgspec.structs.replace(exposure.offer(), regions=[region]))
    answer = liar.hear()
    assert isinstance(answer, Joined)
    assert answer.regions == []
    assert "region 3 cannot lie" in answer.refusal
    exposure.close()


@needs_nixl
def test_memory_used_again_before_it_was_read_is_noticed(reader: Node, liar: Forger) -> None:
    exposure, region = Exposure("liar", "127.0.0.1"), SharedRegion(SIZE)
    exposure.add(0, region)
    liar.say(exposure.offer())
    assert liar.hear() == Joined([0], "")
    arrived = Outcome()
    reader.expect(1, None, Memory(1, 1, 100), arrived)
    describe(liar, 1, b"z" * 100, part_of(0, 0, 100))
    assert "checksum" in arrived.failure()
    reader.forget(1)
    exposure.close()


# Owners that stop or die


@contextlib.contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[bytes], Exposed]]:
    """A process with memory to read, and its offer of that."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cpu.transport.owner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = base64.b64decode(process.stdout.readline())
        yield process, msgspec.msgpack.decode(line[HEAD_BYTES:], type=Exposed)
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Returns when all of its threads stand still."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def join(offer: Exposed, reader: Node) -> Forger:
    """A peer of `reader` whose memory that one has read once, and so is connected with."""
    liar = Forger(reader.peer)  # not before, for a silent one is given up
    liar.say(offer)
    assert liar.hear() == Joined([0], "")
    arrived = Outcome()
    reader.expect(1, None, Memory(1, 1, 100), arrived)
    describe(liar, 1, bytes([owner.BYTE]) * 100, part_of(0, 0, 100))
    assert arrived.wait() is None
    reader.forget(1)
    return liar


@needs_nixl
def test_pages_taken_back_amid_a_read_are_not_written(reader: Node) -> None:
    """The owner is stopped, so that a READ is under way for as long as it takes, and goes on when
    the pages have another owner."""
    with another_process() as (process, offer):
        liar = join(offer, reader)
        stop(process)
        target, arrived = Memory(1, 1, owner.SIZE), Outcome()
        reader.expect(2, None, target, arrived)
        describe(liar, 2, bytes([owner.BYTE]) * owner.SIZE, part_of(0, 0, owner.SIZE))
        until(lambda: under_way(reader))
        forget(reader, 2)
        target.fill(2)
        expected = bytes(target.buffer)
        process.send_signal(signal.SIGCONT)
        liar.wait_until_closed()
        time.sleep(0.5)  # for what might come late
        assert bytes(target.buffer) == expected
        assert arrived.calls == []
    liar.close()
    works(reader)


def under_way(reader: Node) -> bool:
    """Whether a lease is being written."""
    return any(lease.writing for lease in reader._leases._leases.values())


@needs_nixl
def test_an_owner_that_dies_amid_a_read_fails_the_lease(reader: Node) -> None:
    with another_process() as (process, offer):
        liar = join(offer, reader)
        stop(process)
        arrived = Outcome()
        reader.expect(2, None, Memory(1, 1, owner.SIZE), arrived)
        describe(liar, 2, bytes([owner.BYTE]) * owner.SIZE, part_of(0, 0, owner.SIZE))
        until(lambda: under_way(reader))
        process.kill()
        assert "a READ failed" in arrived.failure()
    liar.wait_until_closed()
    liar.close()
    reader.forget(2)
    works(reader)


@needs_nixl
def test_a_read_that_does_not_come_back_is_given_up() -> None:
    reader = make_node("decode", 2, path=TransportPath.RDMA, stall_seconds=5.0)
    with another_process() as (process, offer):
        liar = join(offer, reader)
        stop(process)
        arrived = Outcome()
        reader.expect(2, None, Memory(1, 1, owner.SIZE), arrived)
        describe(liar, 2, bytes([owner.BYTE]) * owner.SIZE, part_of(0, 0, owner.SIZE))

        def over() -> bool:
            with contextlib.suppress(OSError):  # the link may end meanwhile
                liar.say(Ping(0))  # its link is alive
            time.sleep(0.1)
            return bool(arrived.calls)

        until(over)
        assert "a READ has not come back for 5 s" in arrived.failure()
    reader.forget(2)
    liar.close()
    reader.close()


@needs_nixl
def test_a_sender_that_closes_amid_a_transfer_fails_it(reader: Node) -> None:
    sender, region = make_node("prefill", path=TransportPath.RDMA), SharedRegion(8 << 20)
    sender.register(region)
    source, target = Memory(1, 8, 1 << 20, 0, region.buffer).fill(1), Memory(1, 8, 1 << 20)
    arrived, sent = Outcome(), Outcome()
    reader.expect(1, None, target, arrived)
    transfer = sender.link(reader.peer).begin(1, sent)
    transfer.write(list(source.pieces(1))[:-1])
    until(lambda: any(target.buffer))
    sender.close()
    assert "closing" in sent.failure()
    assert "the link from prefill ended" in arrived.failure()
    reader.forget(1)
    works(reader)


@needs_nixl
def test_a_new_link_reads_again_after_one_was_cut(reader: Node) -> None:
    sender, region = make_node("prefill", path=TransportPath.RDMA), SharedRegion(8 << 20)
    sender.register(region)
    source, proxy = Memory(1, 8, 1 << 20, 0, region.buffer).fill(1), Proxy(reader.peer)
    for lease in (1, 2):
        target, arrived, sent = Memory(1, 8, 1 << 20), Outcome(), Outcome()
        reader.expect(lease, None, target, arrived)
        transfer = sender.link(proxy.peer).begin(lease, sent)
        transfer.write(list(source.pieces(1))[:-1])
        until(lambda target=target: any(target.buffer))
        proxy.cut()
        assert "link to decode broke" in sent.failure()
        assert "the link from prefill ended" in arrived.failure()
        reader.forget(lease)
    target, arrived, sent = Memory(1, 8, 1 << 20), Outcome(), Outcome()
    reader.expect(3, None, target, arrived)
    transfer = sender.link(proxy.peer).begin(3, sent)
    transfer.write(list(source.pieces()))
    transfer.finish()
    assert sent.wait() is arrived.wait() is None
    assert target.content() == source.content()
    assert sender.stats()[0].links == 3
    for each in (sender, proxy):
        each.close()

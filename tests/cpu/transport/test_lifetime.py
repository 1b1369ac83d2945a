"""What a node leaves behind, and links under TLS."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import socket
import ssl
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from fourfold.errors import ConfigError
from fourfold.transport import Peer, SharedRegion, TlsFiles, TransportPath
from fourfold.transport.handshake import Handshake, Purpose
from fourfold.transport.tls import load_tls
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import (
    WAIT_SECONDS,
    WAYS,
    Memory,
    Outcome,
    Pair,
    Way,
    make_node,
    send,
    until,
    works,
)
from tests.cpu.transport.proxy import Proxy, opens

FILES = Path(__file__).parent / "certificates"
TLS = TlsFiles(
    certificate=FILES / "worker.pem",
    key=FILES / "worker-key.pem",
    authority=FILES / "authority.pem",
)
STRANGER = TlsFiles(
    certificate=FILES / "stranger.pem",
    key=FILES / "stranger-key.pem",
    authority=FILES / "other-authority.pem",
)


def our_threads() -> set[threading.Thread]:
    return {
        each for each in threading.enumerate() if each.name.startswith(("prefill", "decode"))
    } | {each for each in threading.enumerate() if each.name.startswith("link ")}


def descriptors() -> Counter[str]:
    """How many there are of each thing that is open; a socket or pipe has its own number."""
    open_now: Counter[str] = Counter()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            open_now[os.readlink(f"/proc/self/fd/{each}")] += 1
    return open_now


def mappings() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in lines if "fourfold-pages" in line}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_after_close(way: Way) -> None:
    if way.path is TransportPath.RDMA:
        Pair(way).close()  # what UCX keeps for a process
    gc.collect()
    threads, before, mapped = our_threads(), descriptors(), mappings()
    pair = Pair(way)
    source, target, arrived = pair.memory(2, 10, 5000).fill(1), Memory(2, 10, 5000), Outcome()
    unfinished, waiting = Outcome(), Outcome()
    pair.receiver.expect(1, None, target, arrived)
    pair.receiver.expect(2, None, Memory(1, 1, 1), waiting)
    assert send(pair.sender, pair.receiver, 1, source)[1].wait() is None
    assert arrived.wait() is None
    pair.sender.link(pair.receiver.peer).begin(3, unfinished)
    assert our_threads() > threads
    pair.close()
    assert "closing" in unfinished.failure()
    assert "closing" in waiting.failure()
    assert our_threads() <= threads
    del pair, source
    gc.collect()
    # What earlier tests left behind may go meanwhile: only what is new counts.
    assert descriptors() <= before
    assert mappings() <= mapped
    assert [len(each.calls) for each in (arrived, unfinished, waiting)] == [1, 1, 1]


def test_nothing_is_left_of_a_link_that_is_closed_while_its_streams_open() -> None:
    gc.collect()
    threads, before = our_threads(), descriptors()
    sender, receiver = make_node("prefill", 1, connect_seconds=2.0), make_node("decode", 2)
    proxy, waiting, streams = Proxy(receiver.peer), Outcome(), itertools.count(1)
    held, closed = threading.Event(), threading.Event()

    def hold(data: bytes) -> bytes:
        if opens(data, Purpose.STREAM) and next(streams) == 2:
            held.set()
            closed.wait(WAIT_SECONDS)
        return data

    proxy.alter = hold
    link = sender.link(proxy.peer)
    link.begin(1, waiting)
    assert held.wait(WAIT_SECONDS)
    start = time.monotonic()
    link.close("the test is over")
    assert "the test is over" in waiting.failure()
    assert time.monotonic() - start < 1.0  # it does not wait for the handshake, as its threads do
    sender.close()
    assert not {each for each in our_threads() - threads if each.name.startswith("link ")}
    closed.set()
    for each in (receiver, proxy):
        each.close()
    assert our_threads() <= threads
    del sender, receiver, proxy, link
    gc.collect()
    assert descriptors() <= before
    assert len(waiting.calls) == 1


def test_a_closed_node_can_be_closed_again_and_links_no_more() -> None:
    sender, receiver = make_node("prefill", 1), make_node("decode", 2)
    sender.close()
    sender.close()
    with pytest.raises(RuntimeError, match="closed"):
        sender.link(receiver.peer)
    receiver.close()


def test_the_port_of_a_closed_node_can_be_taken() -> None:
    first = make_node("decode", 2)
    first.close()
    second = make_node("decode", 3, port=first.peer.port)
    works(second)
    with pytest.raises(ConfigError, match="cannot listen"):
        make_node("another", 4, port=first.peer.port)
    second.close()


def test_the_memory_of_a_region_outlives_it() -> None:
    region = SharedRegion(10_000)
    view = region.buffer[100:200]
    view[:] = b"x" * 100
    del region
    assert bytes(view) == b"x" * 100


@pytest.mark.parametrize("way", WAYS)
def test_a_link_says_what_it_found(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pair = Pair(way)
        pair.sender.link(pair.receiver.peer)
        until(lambda: "linked to" in caplog.text)
        pair.close()
    (line,) = [line for line in caplog.messages if "linked to" in line]
    assert "linked to decode (127.0.0.1:" in line
    assert f" over {way.described}: " in line
    assert "GB/s" in line


def test_an_old_link_that_ends_late_leaves_the_new_one_connected() -> None:
    """As after a network that went away: the receiver finds out about the old one last."""
    receiver, ended = make_node("decode", 2), threading.Event()
    receiver.on_lost = lambda epoch: ended.set()
    old, new = Forger(receiver.peer), Forger(receiver.peer)
    old.close()
    assert ended.wait(WAIT_SECONDS)
    (stats,) = receiver.stats()
    assert (stats.connected, stats.links) == (True, 2)
    new.close()
    until(lambda: not receiver.stats()[0].connected)
    receiver.close()


# TLS


@pytest.mark.parametrize("way", WAYS)
def test_pages_arrive_under_tls(way: Way) -> None:
    pair = Pair(way, tls=TLS, key=b"0123456789abcdef", slice_bytes=50_000)
    for lease in range(3):
        source, target, arrived = (
            pair.memory(4, 30, 16_400, 3000),
            Memory(4, 30, 16_400, 3000),
            Outcome(),
        )
        source.fill(lease).shuffle(lease)
        pair.receiver.expect(lease, None, target, arrived)
        assert send(pair.sender, pair.receiver, lease, source)[1].wait() is None
        assert arrived.wait() is None
        assert target.content() == source.content()
    pair.close()


@pytest.mark.parametrize(("mine", "theirs"), [(TLS, STRANGER), (TLS, None), (None, TLS)])
def test_without_the_same_tls_there_is_no_link(
    mine: TlsFiles | None, theirs: TlsFiles | None, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = make_node("prefill", 1, tls=theirs), make_node("decode", 2, tls=mine)
    sent = Outcome()
    sender.link(receiver.peer).begin(1, sent)
    assert "link to decode broke" in sent.failure()
    until(lambda: "closed the connection from" in caplog.text)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("tls", [TLS, None])
def test_pages_are_not_seen_on_the_way_under_tls(tls: TlsFiles | None) -> None:
    sender, receiver = make_node("prefill", 1, tls=tls), make_node("decode", 2, tls=tls)
    proxy, heard = Proxy(receiver.peer), bytearray()

    def listen(data: bytes) -> bytes:
        heard.extend(data)
        return data

    proxy.alter = listen
    source, target = Memory(1, 2, 500).fill(1), Memory(1, 2, 500)
    arrived, sent = Outcome(), Outcome()
    receiver.expect(1, None, target, arrived)
    transfer = sender.link(proxy.peer).begin(1, sent)
    transfer.write(list(source.pieces()))
    transfer.finish()
    assert sent.wait() is arrived.wait() is None
    assert (bytes(source.page(0, 0)) in heard) == (tls is None)
    for each in (sender, receiver, proxy):
        each.close()


class Eavesdropper:
    """Has a certificate of the same authority, and no key: takes connections meant for a node, and
    passes on what it reads."""

    def __init__(self, peer: Peer, tls: TlsFiles) -> None:
        self._tls, self._target = load_tls(tls), (peer.host, peer.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.peer = msgspec.structs.replace(peer, port=self._listener.getsockname()[1])
        """The node as it is reached through here."""
        self.heard = bytearray()
        self._sockets: list[ssl.SSLSocket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._tls.server.wrap_socket(self._listener.accept()[0], server_side=True)
                far = self._tls.client.wrap_socket(socket.create_connection(self._target))
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._pass_on, args=(source, target))
                    thread.start()
                    self._threads.append(thread)

    def _pass_on(self, source: ssl.SSLSocket, target: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.heard += data
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def close(self) -> None:
        """When both ends have closed."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()


@pytest.mark.parametrize("bound", [True, False])
def test_somebody_in_between_with_another_valid_certificate_is_refused(
    bound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it is, and as it would be if proofs were not about certificates."""
    both = tmp_path / "authorities.pem"
    both.write_text("".join(each.authority.read_text() for each in (TLS, STRANGER)))
    files, theirs = (dataclasses.replace(each, authority=both) for each in (TLS, STRANGER))
    if not bound:
        monkeypatch.setattr(Handshake, "bind", lambda self, certificate: None)
    nodes = [
        make_node(name, epoch, tls=files, key=b"0123456789abcdef")
        for name, epoch in (("prefill", 1), ("decode", 2))
    ]
    sender, receiver = nodes
    between = Eavesdropper(receiver.peer, theirs)
    source, target, arrived, sent = Memory(1, 1, 99).fill(1), Memory(1, 1, 99), Outcome(), Outcome()
    receiver.expect(1, None, target, arrived)
    transfer = sender.link(between.peer).begin(1, sent)
    transfer.write(list(source.pieces()))
    transfer.finish()
    if bound:
        assert "somebody with another certificate is in between" in sent.failure()
        until(lambda: "somebody with another certificate" in caplog.text)
    else:
        assert sent.wait() is arrived.wait() is None
    assert (bytes(source.page(0, 0)) in between.heard) != bound
    assert any(target.buffer) != bound
    for each in (*nodes, between):
        each.close()


def test_the_first_certificate_of_a_file_is_the_one_that_counts(tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    parts = [TLS.key, TLS.certificate, TLS.authority]
    chain.write_text("".join(f"made for tests\n{part.read_text()}" for part in parts))
    loaded = load_tls(dataclasses.replace(TLS, certificate=chain))
    assert loaded.certificate == load_tls(TLS).certificate
    assert loaded.certificate != load_tls(STRANGER).certificate


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"certificate": FILES / "none.pem"}, "--tls-cert"),
        ({"key": FILES / "stranger-key.pem"}, "--tls-key"),
        ({"key": FILES / "encrypted-key.pem"}, "--tls-key is encrypted with a passphrase"),
        ({"authority": FILES / "worker-key.pem"}, "--tls-ca"),
    ],
)
def test_files_that_cannot_be_used_are_named(change: dict[str, Path], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        make_node("prefill", 1, tls=dataclasses.replace(TLS, **change))

"""Whoever is no peer, or speaks nonsense, costs one connection and one line of the log."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.errors import ConfigError
from fourfold.transport import Identity, Node, TransportConfig, TransportPath, control
from fourfold.transport.control import Failed, Finish
from fourfold.transport.envelope import HEAD_BYTES, enclose
from fourfold.transport.handshake import Purpose
from tests.cpu.instead import Instead
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import PAGES, Memory, Outcome, make_node, until, works


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(min_size=64, max_size=3000))
def test_garbage_on_a_stream_closes_its_link(receiver: Node, data: bytes) -> None:
    forger = Forger(receiver.peer, streams=1)
    forger.send(0, data)
    forger.wait_until_closed()
    forger.close()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(min_size=HEAD_BYTES, max_size=3000), st.booleans())
def test_garbage_on_control_closes_its_link(receiver: Node, data: bytes, framed: bool) -> None:
    forger = Forger(receiver.peer, streams=0)
    body = b"\xc1" + data  # a byte that msgpack never begins with
    forger.control.send([memoryview(enclose(body) if framed else body)])
    forger.wait_until_closed()
    forger.close()


def test_a_message_that_claims_to_be_long_closes_its_link(receiver: Node, forger: Forger) -> None:
    forger.control.send([memoryview(enclose(bytes(1 << 17)))[:1000]])
    forger.wait_until_closed()


def test_service_goes_on_after_garbage(receiver: Node, caplog: pytest.LogCaptureFixture) -> None:
    forger = Forger(receiver.peer, streams=1)  # another may be in its handshake still
    with caplog.at_level(logging.WARNING):
        forger.send(0, bytes(64))
        forger.wait_until_closed()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "forger" in line
    assert "127.0.0.1" in line
    assert "begins with 0x00000000" in line
    forger.close()
    works(receiver)


def test_a_link_for_which_there_are_no_descriptors_is_turned_away(
    receiver: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that failed would end the whole worker."""
    failed: list[object] = []

    def knock() -> None:
        with contextlib.suppress(EOFError, OSError):
            Forger(receiver.peer)

    stranger = threading.Thread(target=knock, daemon=True)

    def socketpair() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with (
        mock.patch.object(threading, "excepthook", failed.append),
        mock.patch.object(control, "socket", Instead(socket, socketpair=socketpair)),
        caplog.at_level(logging.WARNING),
    ):
        stranger.start()
        until(lambda: failed or "Too many open files" in caplog.text)
    assert not failed
    stranger.join()
    works(receiver)


def test_a_payload_larger_than_allowed_closes_the_link(receiver: Node, forger: Forger) -> None:
    forger.send(0, forger.frame(1, 0, 0, bytes(100), length=(8 << 20) + 1))
    forger.wait_until_closed()


def make_other(key: bytes | None = None, **changes: object) -> Node:
    identity = Identity(name="other", epoch=1, model="m", pages=PAGES)
    config = TransportConfig(key=key, stall_seconds=20.0)
    return Node(msgspec.structs.replace(identity, **changes), config)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: make_other(b"0123456789abcdef"), ["--key-file"]),
        (lambda: make_other(model="n"), ["model n", "m"]),
        (
            lambda: make_other(pages=msgspec.structs.replace(PAGES, kv_heads=7)),
            ["kv_heads", "7", "2"],
        ),
    ],
)
def test_both_sides_name_what_differs(
    receiver: Node, caplog: pytest.LogCaptureFixture, other: object, words: list[str]
) -> None:
    assert callable(other)
    node = other()
    sent = Outcome()
    node.link(receiver.peer).begin(1, sent)
    reason = sent.failure()
    until(lambda: "closed the connection from" in caplog.text)
    for word in words:
        assert word in reason
        assert word in caplog.text
    node.close()
    works(receiver)


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(4000)])
def test_strangers_on_the_port_get_one_line(
    receiver: Node, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    with socket.create_connection((receiver.peer.host, receiver.peer.port)) as stranger:
        with contextlib.suppress(OSError):  # it may be closed already
            stranger.sendall(data.ljust(64 if data else 0))
            stranger.shutdown(socket.SHUT_WR)
        until(lambda: "closed the connection from 127.0.0.1" in caplog.text)
    assert len(caplog.records) == 1
    works(receiver)


def test_strangers_that_say_nothing_do_not_fill_the_house() -> None:
    receiver = make_node("decode", 2, connect_seconds=1.0)
    strangers = [
        socket.create_connection((receiver.peer.host, receiver.peer.port)) for _ in range(80)
    ]
    for stranger in strangers:
        stranger.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
    works(receiver)
    receiver.close()


def test_a_stream_needs_its_link(receiver: Node, forger: Forger) -> None:
    forger._session = os.urandom(16)
    stream = forger.dial(Purpose.STREAM)
    with pytest.raises((EOFError, OSError)):
        stream.receive([memoryview(bytearray(1))])
    stream.close()


def test_a_message_about_a_lease_of_others_changes_nothing(receiver: Node, forger: Forger) -> None:
    arrived = Outcome()
    receiver.expect(1, 55, Memory(1, 1, 10), arrived)
    forger.say(Finish(1, 0))
    assert isinstance(forger.hear(), Failed)
    assert arrived.calls == []
    receiver.forget(1)


def test_off_loopback_a_key_is_needed() -> None:
    with pytest.raises(ConfigError, match="--key-file"):
        TransportConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="16 bytes"):
        TransportConfig(host="0.0.0.0", key=b"short")
    assert TransportConfig(host="0.0.0.0", key=bytes(16)).path is TransportPath.AUTO

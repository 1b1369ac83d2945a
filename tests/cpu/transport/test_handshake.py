"""Two sides that hold one key and serve one model meet; all others learn why not."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import AuthenticationError, ConfigError
from fourfold.transport import handshake
from fourfold.transport.format import PageFormat
from fourfold.transport.handshake import ForeignError, Handshake, Purpose, Role
from fourfold.transport.identity import Identity

KEY = b"0123456789abcdef"
PAGES = PageFormat(
    layers=4,
    kv_heads=2,
    head_width=64,
    page_tokens=64,
    code="int8",
    open_code="bfloat16",
    record_bytes=16400,
)
PREFILL = Identity(name="prefill-0", epoch=2**63 + 5, model="m w4a8", pages=PAGES)
DECODE = Identity(name="decode-0", epoch=7, model="m w4a8", pages=PAGES)
SESSION = bytes(range(16))


def dialler(identity: Identity = PREFILL, key: bytes | None = KEY) -> Handshake:
    return Handshake(Role.DIALLER, identity, key, purpose=Purpose.STREAM, session=SESSION)


def listener(identity: Identity = DECODE, key: bytes | None = KEY) -> Handshake:
    return Handshake(Role.LISTENER, identity, key)


def meet(one: Handshake, other: Handshake, cut: int = 1 << 20) -> None:
    """Carries bytes both ways, `cut` at a time, until nothing is left to carry."""
    waiting = {id(one): other.start(), id(other): one.start()}
    while any(waiting.values()):
        for here, there in ((one, other), (other, one)):
            data, waiting[id(here)] = waiting[id(here)][:cut], waiting[id(here)][cut:]
            waiting[id(there)] += here.feed(data)


@settings(deadline=None)
@given(st.integers(1, 200), st.sampled_from([KEY, None]))
def test_they_meet_however_the_bytes_are_cut(cut: int, key: bytes | None) -> None:
    one, other = dialler(key=key), listener(key=key)
    meet(one, other, cut)
    assert one.result is not None
    assert other.result is not None
    assert one.result.identity == DECODE
    assert other.result.identity == PREFILL
    assert other.result.purpose is Purpose.STREAM
    assert other.result.session == SESSION


@pytest.mark.parametrize("key", [b"another key, long enough", None])
def test_both_learn_that_keys_differ_and_tell_nothing(key: bytes | None) -> None:
    one, other = dialler(), listener(key=key)
    meet(one, other)
    for side in (one, other):
        assert isinstance(side.error, AuthenticationError)
        assert side.result is None
        assert "--key-file" in str(side.error)


@pytest.mark.parametrize(
    ("shown", "had"), [(b"a" * 32, b"b" * 32), (b"a" * 32, None), (None, b"b" * 32)]
)
def test_both_refuse_a_certificate_that_is_not_the_listeners(
    shown: bytes | None, had: bytes | None
) -> None:
    """The dialler sees that of somebody in between, who may leave TLS out on one way."""
    one, other = dialler(), listener()
    for side, certificate in ((one, shown), (other, had)):
        if certificate is not None:
            side.bind(certificate)
    meet(one, other)
    for side, certificate in ((one, shown), (other, had)):
        assert isinstance(side.error, AuthenticationError)
        assert ("in between" in str(side.error)) == (certificate is not None)


def test_a_proof_serves_once() -> None:
    """What a dialler said to one listener is refused by another, and by the same again."""
    heard: list[bytes] = []
    one, other = dialler(), listener()
    heard.append(one.start())
    hello = other.feed(heard[0])
    heard.append(one.feed(hello))
    again = listener()
    again.feed(heard[0])
    again.feed(heard[1])
    assert isinstance(again.error, AuthenticationError)


def test_a_listener_cannot_be_answered_with_its_own_proof() -> None:
    """The dialler's proof, sent back to it, does not make a listener of an echo."""
    one = dialler()
    hello = one.start()
    proof = one.feed(hello)
    one.feed(proof)
    assert isinstance(one.error, AuthenticationError)


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"pages": msgspec.structs.replace(PAGES, kv_heads=8)}, ("2", "8")),
        ({"pages": msgspec.structs.replace(PAGES, page_tokens=32)}, ("64", "32")),
        ({"model": "another"}, ("m w4a8", "another")),
    ],
)
def test_both_learn_both_values_of_what_differs(
    change: dict[str, object], both: tuple[str, str]
) -> None:
    one, other = dialler(), listener(msgspec.structs.replace(DECODE, **change))
    meet(one, other)
    for side in (one, other):
        assert isinstance(side.error, ConfigError)
        assert all(value in str(side.error) for value in both)


def test_codes_may_differ_and_a_gateway_has_no_pages() -> None:
    fp8 = msgspec.structs.replace(PAGES, code="fp8")
    for identity in (
        msgspec.structs.replace(DECODE, pages=fp8),
        msgspec.structs.replace(DECODE, pages=None, model=""),
    ):
        one, other = dialler(), listener(identity)
        meet(one, other)
        assert one.error is None
        assert other.error is None


def test_both_learn_that_their_versions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = dialler(), listener()
    hello = one.start()
    now = handshake.VERSION
    monkeypatch.setattr(handshake, "VERSION", now + 1)
    answer = other.feed(hello)
    assert f"speaks version {now} of the handshake, this one {now + 1}" in str(other.error)
    monkeypatch.undo()
    one.feed(answer)
    assert f"speaks version {now + 1} of the handshake, this one {now}" in str(one.error)


@settings(deadline=None)
@given(st.binary(min_size=200, max_size=400))
def test_garbage_is_no_handshake(data: bytes) -> None:
    for side in (dialler(), listener()):
        side.feed(data)
        assert isinstance(side.error, ForeignError)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_garbage_after_the_proofs_is_no_identity(data: bytes) -> None:
    one, other = dialler(), listener()
    proof = one.feed(other.feed(one.start()))
    other.feed(proof)
    other.feed(len(data).to_bytes(4, "little") + data)
    assert isinstance(other.error, ForeignError)


def test_a_driver_that_reads_only_what_is_wanted_reads_nothing_else() -> None:
    one, other = dialler(), listener()
    streams = {id(one): bytearray(), id(other): bytearray(one.start())}
    while not (one.over and other.over):
        for here, there in ((one, other), (other, one)):
            arrived = streams[id(here)]
            if here.over or not arrived:
                continue
            wanted = here.wanted
            assert wanted > 0
            data = bytes(arrived[:wanted])
            del arrived[:wanted]
            streams[id(there)] += here.feed(data)
    assert not any(streams.values())

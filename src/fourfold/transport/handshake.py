"""How two processes of a service come to trust each other, without any input or output.

The dialler proves that it holds the key, then the listener does, and only then is anything else
read. Each proof is an HMAC-SHA256 over who speaks, what the connection is for, and what both drew
at random, so that no proof serves twice or the other way round. Then each tells who it is, and each
checks that they can work together.

    dialler                                   listener
    hello: purpose, session, nonce     ->
                                       <-     hello: nonce
    proof                              ->
                                       <-     proof, identity
    identity                           ->

This secures who connects. What is sent later is secret, and safe from someone who can change
packets on their way, only under TLS. There both proofs are also about the listener's certificate
(RFC 5929, tls-server-end-point): somebody in between, with a certificate of the same authority but
without the key, cannot pass proofs on.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import struct
from collections.abc import Generator

import msgspec

from fourfold.errors import AuthenticationError, FourfoldError
from fourfold.transport.identity import Identity, check_identities

VERSION = 3
_MAGIC = b"4FLD"
_LENGTH = struct.Struct("<I")
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"<4sHH16s{_NONCE_BYTES}s")
_MAX_IDENTITY = 1 << 16
_REFUSED = bytes(_PROOF_BYTES)
"""Sent in place of a proof, so that the dialler learns at once that the keys differ."""
NO_SESSION = bytes(16)
_NO_CERTIFICATE = bytes(32)
"""Shown by a listener without TLS."""


_Steps = Generator[int, bytes, "Introduction"]
"""Yields how many bytes it needs next and is sent them."""


class Purpose(enum.IntEnum):
    """What a connection is for."""

    LINK = 1
    """Control of a link between workers; its session is drawn by the dialler."""
    STREAM = 2
    """Pages of the link with the same session."""
    GATEWAY = 3
    """A gateway's requests to a worker."""


class Role(enum.StrEnum):
    """Who began."""

    DIALLER = "dialler"
    LISTENER = "listener"


class ForeignError(FourfoldError):
    """Bytes that are no handshake of ours."""


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """What a handshake came to."""

    identity: Identity
    """Of the other side."""
    purpose: Purpose
    session: bytes


class Handshake:
    """One side of a handshake. Under TLS, `bind` it. Send `start()`, then what each `feed` returns,
    until `over`; then raise `error` if there is one.
    """

    def __init__(
        self,
        role: Role,
        identity: Identity,
        key: bytes | None,
        *,
        purpose: Purpose = Purpose.LINK,
        session: bytes = NO_SESSION,
    ) -> None:
        """`purpose` and `session` are the dialler's to choose."""
        self._identity, self._key = identity, key or b""
        self._nonce = os.urandom(_NONCE_BYTES)
        self._certificate = _NO_CERTIFICATE
        self._arrived, self._sending = bytearray(), bytearray()
        dials = role is Role.DIALLER
        self._steps = self._dial(purpose, session) if dials else self._listen()
        self._next = next(self._steps)
        self.result: Introduction | None = None
        self.error: FourfoldError | None = None

    @property
    def over(self) -> bool:
        """Whether `result` or `error` is there."""
        return self.result is not None or self.error is not None

    @property
    def wanted(self) -> int:
        """Bytes to read before anything can be answered; more must not be read, for nobody would
        get what comes after the handshake."""
        return max(0, self._next - len(self._arrived))

    def bind(self, certificate: bytes) -> None:
        """Makes both proofs hold for one certificate of the listener only, by its 32-byte hash: the
        one that it has, at the listener; the one that was shown, at the dialler."""
        self._certificate = certificate

    def start(self) -> bytes:
        """What to send before anything came."""
        return self._take_sending()

    def feed(self, data: bytes | memoryview) -> bytes:
        """Takes what came and returns what to send, also where an error came of it."""
        self._arrived += data
        while not self.over and len(self._arrived) >= self._next:
            part = bytes(self._arrived[: self._next])
            del self._arrived[: self._next]
            self._next = 0
            try:
                self._next = self._steps.send(part)
            except StopIteration as end:
                self.result = end.value
            except FourfoldError as error:
                self.error = error
        return self._take_sending()

    def _take_sending(self) -> bytes:
        sending = bytes(self._sending)
        self._sending.clear()
        return sending

    def _dial(self, purpose: Purpose, session: bytes) -> _Steps:
        self._sending += _HELLO.pack(_MAGIC, VERSION, purpose, session, self._nonce)
        _, _, nonce = _open_hello((yield _HELLO.size))
        words = self._words(purpose, session, self._nonce, nonce)
        self._sending += self._prove(Role.DIALLER, words)
        self._check((yield _PROOF_BYTES), Role.LISTENER, words)
        theirs = yield from self._meet(introduce_first=False)
        return Introduction(identity=theirs, purpose=purpose, session=session)

    def _listen(self) -> _Steps:
        hello = yield _HELLO.size
        if hello.startswith(_MAGIC):  # of another version, too: then both learn it
            self._sending += _HELLO.pack(_MAGIC, VERSION, 0, NO_SESSION, self._nonce)
        purpose, session, nonce = _open_hello(hello)
        words = self._words(purpose, session, nonce, self._nonce)
        proof = yield _PROOF_BYTES
        try:
            self._check(proof, Role.DIALLER, words)
        except AuthenticationError:
            self._sending += _REFUSED
            raise
        self._sending += self._prove(Role.LISTENER, words)
        theirs = yield from self._meet(introduce_first=True)
        try:
            return Introduction(identity=theirs, purpose=Purpose(purpose), session=session)
        except ValueError:
            raise ForeignError(f"a connection for purpose {purpose} means nothing here") from None

    def _words(
        self, purpose: int, session: bytes, dialler_nonce: bytes, listener_nonce: bytes
    ) -> bytes:
        """What both proofs are about; all of fixed length."""
        hello = _HELLO.pack(_MAGIC, VERSION, purpose, session, dialler_nonce)
        return hello + listener_nonce + self._certificate

    def _prove(self, role: Role, words: bytes) -> bytes:
        return hmac.digest(self._key, role.encode() + words, hashlib.sha256)

    def _check(self, proof: bytes, role: Role, words: bytes) -> None:
        if not hmac.compare_digest(proof, self._prove(role, words)):
            between = (
                ""
                if self._certificate == _NO_CERTIFICATE
                else ", or somebody with another certificate is in between"
            )
            raise AuthenticationError(
                f"the other side's key differs from ours{between}; start both with the same "
                "--key-file"
            )

    def _meet(self, *, introduce_first: bool) -> Generator[int, bytes, Identity]:
        """Who the other side is. Both sides hear it before either may find that they differ."""
        body = msgspec.msgpack.encode(self._identity)
        introduction = _LENGTH.pack(len(body)) + body
        if introduce_first:
            self._sending += introduction
        (length,) = _LENGTH.unpack((yield _LENGTH.size))
        if length > _MAX_IDENTITY:
            raise ForeignError(f"an introduction of {length} bytes is too long")
        body = yield length
        try:
            theirs = msgspec.msgpack.decode(body, type=Identity)
        except msgspec.DecodeError as error:
            raise ForeignError(f"an introduction cannot be read: {error}") from None
        if not introduce_first:
            self._sending += introduction
        check_identities(self._identity, theirs)
        return theirs


def _open_hello(data: bytes) -> tuple[int, bytes, bytes]:
    """Purpose, session and nonce."""
    magic, version, purpose, session, nonce = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise ForeignError(f"its first bytes, {magic!r}, are none of ours")
    if version != VERSION:
        raise ForeignError(
            f"the other side speaks version {version} of the handshake, this one {VERSION}; "
            "run the same release on both"
        )
    return purpose, session, nonce

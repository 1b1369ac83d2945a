"""A worker that joins a gateway over the network, again and again, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets

from fourfold import errors
from fourfold.cluster.wiring import plain_socket
from fourfold.engine.channel import LoadFailed, Refused
from fourfold.engine.worker import End, Worker
from fourfold.errors import ConfigError, FourfoldError
from fourfold.transport.config import TransportConfig, is_host
from fourfold.transport.handshake import Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.tls import load_tls
from fourfold.transport.wire import dial

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_LONGEST_PAUSE = 10.0
"""Seconds between two attempts to join, at most."""
_UNACKNOWLEDGED = 5.0
"""Seconds after which the system gives up a connection whose other end does not acknowledge."""


class Joining:
    """Joins the gateway at an address for ever. `leave` may be called by a signal handler."""

    def __init__(self, worker: Worker, name: str, address: str, transport: TransportConfig) -> None:
        """Takes key and TLS from `transport`. Raises `ConfigError` where `address` is not
        HOST:PORT, or TLS cannot be had."""
        self._worker = worker
        self._host, self._port = split_address(address)
        self._key = transport.key
        self._tls = None if transport.tls is None else load_tls(transport.tls)
        self._name = name
        self._known = False
        self._leaving = False
        # Whoever waits for an event holds its lock now and then, and a signal handler would wait
        # for that for ever.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(self) -> None:
        """Returns when the gateway has let this worker go, or has nothing of it to take back.
        Raises what was wrong where it is of no use to try again."""
        failures, told = 0, False
        while not self._leaving:
            try:
                end = self._serve()
            except (OSError, FourfoldError) as error:
                # Once both knew the key, a proof that is wrong was altered on its way.
                if isinstance(error, errors.AuthenticationError) and not self._known:
                    raise
                if not told:
                    told = True
                    logger.warning(
                        "the gateway at %s:%d cannot be joined (%s); trying until it can",
                        self._host,
                        self._port,
                        error,
                    )
            else:
                told = False
                if end is End.STOPPED:
                    return
                self._check_refusal()
                if end is End.LOST:
                    failures = 0
                    logger.warning("the gateway is lost; joining again")
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=min(_LONGEST_PAUSE, 0.25 * 2**failures))
            failures = min(failures + 1, 10)

    @property
    def leaving(self) -> bool:
        return self._leaving

    def leave(self) -> None:
        """Ends `run`, once the gateway has taken back what is here."""
        self._leaving = True
        self._wake.put(None)
        self._worker.leave()

    def _serve(self) -> End:
        identity = Identity(name=self._name, epoch=secrets.randbits(63), model="")
        handshake = Handshake(Role.DIALLER, identity, self._key, purpose=Purpose.GATEWAY)
        wire, _ = dial(self._host, self._port, handshake, _CONNECT_SECONDS, self._tls)
        self._known = True
        logger.info("joined the gateway at %s:%d as %s", self._host, self._port, self._name)
        secured = self._tls is not None
        return self._worker.serve(plain_socket(wire, _UNACKNOWLEDGED, secured=secured))

    def _check_refusal(self) -> None:
        """Raises why the gateway did not take this worker, if it is of no use to ask again."""
        match self._worker.refusal:
            case LoadFailed() as failed:
                kind: type[FourfoldError] = getattr(errors, failed.kind)
                raise kind(failed.message)
            case Refused(again=False) as refused:
                raise ConfigError(refused.message)
            case Refused() as refused:
                logger.warning("the gateway does not take this worker yet: %s", refused.message)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [HOST]:PORT. Raises `ConfigError`."""
    host, _, port = address.rpartition(":")
    if not is_host(host) or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(
            f"--join {address} is no HOST:PORT; give the gateway's, for example 10.0.0.5:7000"
        )
    return host.strip("[]"), int(port)

"""One process's end of the transport: it listens, keeps leases, and links to others."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from fourfold.errors import ConfigError, FourfoldError
from fourfold.transport import nixl
from fourfold.transport.config import TransportConfig, TransportPath
from fourfold.transport.handshake import Handshake, Introduction, Purpose, Role
from fourfold.transport.identity import Identity, host_id
from fourfold.transport.leases import Done, Leases
from fourfold.transport.link import Link
from fourfold.transport.notifier import Notifier
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Landing
from fourfold.transport.rdma import ExposeError, Exposure
from fourfold.transport.session import Session
from fourfold.transport.shared import Regions, SharedRegion
from fourfold.transport.stats import Counters, PathStats
from fourfold.transport.tls import load_tls
from fourfold.transport.wire import Wire, answer, listen

logger = logging.getLogger(__name__)

_MAX_STRANGERS = 64
"""Connections whose handshake is not over; more are closed at once."""
_MAX_SESSIONS = 1024
_MAX_COUNTERS = 2048
_LOOK_SECONDS = 0.5
"""After which the listening thread looks whether it is over."""
_CLOSE_SECONDS = 10.0


class Node:
    """Receives pages into its leases, and sends pages into those of its peers.

    Callbacks come from one thread of the node's own, without locks held.
    """

    def __init__(self, identity: Identity, config: TransportConfig) -> None:
        """Listens at once. Raises `ConfigError` where it cannot, or where TLS or RDMA was asked for
        and cannot be used."""
        self._identity, self._config = identity, config
        self._tls = None if config.tls is None else load_tls(config.tls)
        self._exposure = _expose(identity, config)
        self._listener = listen(config.host, config.port)
        self._listener.settimeout(_LOOK_SECONDS)
        self.peer = Peer(
            name=identity.name,
            epoch=identity.epoch,
            host=config.advertise or config.host,
            port=self._listener.getsockname()[1],
            host_id=host_id(),
            rdma=self._exposure is not None,
            pages=identity.pages,
            device=identity.device,
        )
        """How others reach this node."""
        self.on_lost: Callable[[int], None] = lambda epoch: None
        """Called when a link from a peer has ended, with the peer's epoch."""
        self._notifier = Notifier(f"{identity.name} callbacks")
        self._leases = Leases(self._notifier)
        self._regions = Regions()
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int], Link] = {}
        self._sessions: dict[bytes, Session] = {}
        self._counters: dict[tuple[str, bool], Counters] = {}
        self._threads: set[threading.Thread] = set()
        self._strangers = 0
        self._closed = False
        self._acceptor = threading.Thread(
            target=self._accept, name=f"{identity.name} listener", daemon=True
        )
        self._acceptor.start()

    @property
    def may_share(self) -> bool:
        """Whether pages may go through memory of this machine."""
        return self._config.path in (TransportPath.AUTO, TransportPath.SHARED_MEMORY)

    def register(self, region: SharedRegion) -> None:
        """Lets peers read a region, those on this host and those with RDMA: pages that lie in it
        need not be sent. Keeps it for as long as this node lives. Raises `ConfigError` where RDMA
        was asked for, and cannot be had for it."""
        number = self._regions.add(region)
        if self._exposure is not None:
            try:
                self._exposure.add(number, region)
            except ExposeError as error:
                if self._config.path is TransportPath.RDMA:
                    raise ConfigError(str(error)) from error
                logger.warning("pages to other machines go over TCP: %s", error)
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.offer()

    def expect(self, lease: int, writer_epoch: int | None, landing: Landing, done: Done) -> None:
        """Opens a lease: pages for it are taken from now on, from the incarnation `writer_epoch` of
        a peer or from any.

        `done(None)` is called when everything came and is right, else `done(reason)`; after either
        nothing is written any more. A number is used once: late words of an earlier transfer would
        be taken for this one's. Raises `ValueError` where it is in use.
        """
        self._leases.expect(lease, writer_epoch, landing, done)

    def forget(self, lease: int, left: Callable[[], None] = lambda: None) -> bool:
        """Closes a lease, done or not, if there is one; never waits. `done` is not called any more.

        Returns whether no thread of ours writes into its memory: so it is after `done`. Else `left`
        is called, as `done` would be, when none does any more: after a moment, for a link that
        stands still is closed.
        """
        return self._leases.forget(lease, left)

    def link(self, peer: Peer) -> Link:
        """The link to a peer: the same for each call until it breaks, then another."""
        key = (peer.name, peer.epoch)
        with self._lock:
            if self._closed:
                raise RuntimeError("a closed node has no links")
            link = self._links.get(key)
            if link is None or link.broken is not None:
                self._links = {at: each for at, each in self._links.items() if not each.broken}
                link = self._links[key] = Link(
                    peer,
                    identity=self._identity,
                    config=self._config,
                    tls=self._tls,
                    regions=self._regions,
                    exposure=self._exposure,
                    counters=self._counters_of(peer.name, sends=True),
                    notifier=self._notifier,
                )
            return link

    def linked_by(self, epoch: int) -> bool:
        """Whether a link of this incarnation of a peer stands, of whose end `on_lost` will tell."""
        with self._lock:
            return any(session.epoch == epoch for session in self._sessions.values())

    def stats(self) -> list[PathStats]:
        """What came of the links to and from each peer so far."""
        with self._lock:
            counters = list(self._counters.values())
        return [each.stats() for each in counters]

    def close(self) -> None:
        """Ends all links and leases; what is under way fails on both sides."""
        reason = "this node is closing"
        with self._lock:
            self._closed = True
            links, sessions = list(self._links.values()), list(self._sessions.values())
        for link in links:
            link.close(reason)
        for session in sessions:
            session.close(reason)
        deadline = time.monotonic() + _CLOSE_SECONDS
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes its thread, on Linux
        self._acceptor.join(_CLOSE_SECONDS)
        self._listener.close()
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._exposure is not None:
            self._exposure.close()
        self._leases.lose(None, reason)
        self._notifier.close(_CLOSE_SECONDS)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._closed:
                    return
                # For instance no more descriptors; those at work go on and may free some.
                logger.warning("cannot accept a connection: %s", error)
                time.sleep(_LOOK_SECONDS)
                continue
            with self._lock:
                full = self._strangers >= _MAX_STRANGERS or self._closed
                self._strangers += not full
            if full:
                connection.close()
                continue
            thread = threading.Thread(
                target=self._meet, args=(connection,), name=f"{self.peer.name} guest", daemon=True
            )
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _meet(self, connection: socket.socket) -> None:
        """Serves one connection to its end, once it has shown who it is."""
        try:
            met = self._shake(connection)
            if met is not None:
                self._serve(*met)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _shake(self, connection: socket.socket) -> tuple[Wire, Introduction] | None:
        address = "a closed connection"
        with contextlib.suppress(OSError):
            host, port, *_ = connection.getpeername()
            address = f"{host}:{port}"
        handshake = Handshake(Role.LISTENER, self._identity, self._config.key)
        try:
            return answer(connection, handshake, self._config.connect_seconds, self._tls)
        except (FourfoldError, OSError) as error:
            logger.warning("closed the connection from %s: %s", address, error)
            return None
        finally:
            with self._lock:
                self._strangers -= 1

    def _serve(self, wire: Wire, introduction: Introduction) -> None:
        match introduction.purpose:
            case Purpose.LINK:
                session = self._admit(wire, introduction)
                if session is not None:
                    try:
                        session.run()
                    finally:
                        with self._lock:
                            self._sessions.pop(introduction.session, None)
                        epoch = session.epoch
                        self._notifier.put(lambda: self.on_lost(epoch))
                    return
            case Purpose.STREAM:
                with self._lock:
                    session = self._sessions.get(introduction.session)
                if session is not None and session.peer == introduction.identity:
                    session.serve(wire)
                    return
        logger.warning("closed the connection from %s: it belongs to no link", wire.address)
        wire.close()

    def _admit(self, wire: Wire, introduction: Introduction) -> Session | None:
        """A new session, unless there are too many, its number is taken, or descriptors have run
        out."""
        wire.give_up_after(self._config.stall_seconds)
        with self._lock:
            taken = introduction.session in self._sessions
            if self._closed or taken or len(self._sessions) >= _MAX_SESSIONS:
                return None
            try:
                session = Session(
                    wire,
                    introduction,
                    me=self._identity,
                    config=self._config,
                    leases=self._leases,
                    rdma=self._exposure is not None,
                    counters=self._counters_of(introduction.identity.name, sends=False),
                )
            except OSError as error:
                logger.warning("cannot take a link from %s: %s", wire.address, error)
                return None
            self._sessions[introduction.session] = session
            return session

    def _counters_of(self, peer: str, *, sends: bool) -> Counters:
        """The counters of a peer and direction; beyond a bound the oldest are given up."""
        key = (peer, sends)
        if key not in self._counters:
            if len(self._counters) >= _MAX_COUNTERS:
                del self._counters[next(iter(self._counters))]
            self._counters[key] = Counters(peer, sends=sends)
        return self._counters[key]


def _expose(identity: Identity, config: TransportConfig) -> Exposure | None:
    """What lets peers read this node's memory over RDMA, if that was asked for, or may be chosen
    and can be had. Raises `ConfigError` where it was asked for in vain."""
    asked = config.path is TransportPath.RDMA
    # A device that nobody asked for is not used by software, whatever the environment says of UCX.
    chosen = config.path is TransportPath.AUTO and nixl.devices() and not nixl.chosen_transports()
    if not asked and not chosen:
        return None
    if asked:
        nixl.check(config.host)
    elif nixl.why_not(config.host) is not None:
        return None  # links to other machines warn of it
    try:
        return Exposure(f"{identity.name} {identity.epoch:x}", config.host)
    except ConfigError as error:
        if asked:
            raise
        logger.warning("pages to other machines go over TCP: %s", error)
        return None

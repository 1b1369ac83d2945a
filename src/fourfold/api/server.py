"""Runs the app on uvicorn from a bound port to a clean exit.

Signals are ours rather than uvicorn's, because a graceful end begins in the gateway: it stops
admitting while the server still answers (/ready says 503, new requests get a typed 503), running
requests finish or are cancelled at the deadline, and only then does the listening socket close.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from fourfold.api.config import ApiConfig
from fourfold.api.protocol import bounded_protocol
from fourfold.errors import ConfigError

if TYPE_CHECKING:
    from fourfold.gateway.gateway import Gateway

_BACKLOG = 2048
_LAST_WORDS = 5
"""Seconds for answers that are being written when the gateway has drained."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` on uvloop's event loop where that is installed."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as loop_factory
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


def bind(config: ApiConfig) -> socket.socket:
    """A socket with the address taken, not listening yet; `ConfigError` says what to change where
    it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):  # the latter: no name of a host at all
        message = f"--host {config.host} is not known; give an address of this machine"
        raise ConfigError(message) from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(_bind_remedy(error, config)) from None
    return listener


def _bind_remedy(error: OSError, config: ApiConfig) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            remedy = f"is taken; choose another with --port, or stop what listens on {config.port}"
        case errno.EACCES:
            remedy = "needs more rights; choose one above 1023 with --port"
        case errno.EADDRNOTAVAIL:
            remedy = "cannot be bound; give --host an address of this machine"
        case _:
            remedy = f"cannot be bound ({error.strerror}); choose others with --host and --port"
    return f"port {config.port} on {config.host} {remedy}"


async def serve(
    app: ASGIApp,
    gateway: Gateway,
    config: ApiConfig,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until a signal or `stop`, then drains and returns.

    The first SIGTERM or SIGINT drains the gateway for at most `config.drain_timeout` seconds; a
    SIGINT after that aborts whatever still runs. `listener` is what `bind` gave, for a caller
    who wants to know early that the port is free; `on_ready` gets the URL once connections are
    accepted. The gateway is drained on return, but closing it is its owner's part.
    """
    listener = listener or bind(config)
    server = _Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(config),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=config.keep_alive_timeout,
            timeout_graceful_shutdown=_LAST_WORDS,
        ),
        config,
        on_started=lambda: on_ready(_url(listener, config)) if on_ready else None,
    )
    async with _ending(server, gateway, config, stop or asyncio.Event()):
        await server.serve(sockets=[listener])


def _url(listener: socket.socket, config: ApiConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, telling when it accepts connections."""

    def __init__(
        self, config: uvicorn.Config, bounds: ApiConfig, on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._bounds = bounds
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            try:
                listener.listen(_BACKLOG)
            except OSError as error:  # another server came first since `bind`
                raise ConfigError(_bind_remedy(error, self._bounds)) from None
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _ending(
    server: _Server, gateway: Gateway, config: ApiConfig, stop: asyncio.Event
) -> AsyncIterator[None]:
    """While inside, `stop` and signals lead to the end of `server`."""

    async def drain() -> None:
        await stop.wait()
        logger.info("Draining for up to %g seconds", config.drain_timeout)
        try:
            await gateway.drain(config.drain_timeout)
        finally:
            server.should_exit = True

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set() and number is signal.SIGINT:
            logger.warning("Aborting what still runs")
            gateway.abort_all()
            server.should_exit = server.force_exit = True
        stop.set()

    loop = asyncio.get_running_loop()
    # Only a main thread can handle signals; elsewhere `stop` is the way to end.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    draining = asyncio.create_task(drain())
    for number in handled:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining

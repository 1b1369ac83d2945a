"""NIXL, which moves memory over RDMA: finding it, and one agent of it with its UCX backend.

Only the memory of this process is named here. Who may read what is for `rdma`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fourfold.errors import ConfigError
from fourfold.transport.config import is_loopback

_DEVICES = Path("/sys/class/infiniband")
INSTALL = "pip install 'fourfold[rdma]'"
_LOOK_MICROSECONDS = 10_000
"""After which an agent's thread looks around even if nothing woke it. NIXL's own Python class
leaves no pause, and takes a core for each agent; therefore the bindings below it are used."""

Piece = tuple[int, int]
"""Address and bytes."""


def devices() -> list[str]:
    """Names of the RDMA devices of this machine."""
    try:
        return sorted(each.name for each in _DEVICES.iterdir())
    except OSError:
        return []


def chosen_transports() -> str | None:
    """The transports that UCX was told to use by the environment, if it was."""
    return os.environ.get("UCX_TLS")


def why_not(host: str) -> str | None:
    """Why pages cannot go over RDMA from a node that listens on `host`, and what would help; None
    where they can. Loads nothing."""
    transports = chosen_transports()
    if importlib.util.find_spec("nixl") is None:
        return f"NIXL is not installed; {INSTALL}"
    if transports is None and not devices():
        return (
            f"there is no RDMA device in {_DEVICES}; choose --transport auto (or, to try this way "
            "without one on a single machine, set UCX_TLS=tcp: slower than --transport tcp)"
        )
    if transports is not None and _listens(transports) and not is_loopback(host):
        return (
            f"UCX_TLS={transports} would have UCX listen for TCP, where whoever connects reads "
            "this process's memory; leave tcp out of UCX_TLS, or choose --transport tcp"
        )
    return None


def check(host: str) -> None:
    """Raises `ConfigError` where pages cannot go over RDMA from a node that listens on `host`."""
    if (reason := why_not(host)) is not None:
        raise ConfigError(f"pages cannot go over RDMA: {reason}")


def describe() -> str:
    """What the path is called, with what UCX may use."""
    if (transports := chosen_transports()) is not None:
        return f"rdma (ucx, UCX_TLS={transports})"
    first, *others = devices() or ["no device"]
    return f"rdma (ucx over {first}{f' and {len(others)} more' if others else ''})"


class Request(NamedTuple):
    """A READ."""

    handle: int


class NixlAgent:
    """One agent, which knows some memory of this process and of others. For any thread, but its
    calls wait for each other; those that take time do not hold Python's lock.

    What NIXL raises comes through as it is: it has no class of errors in common.
    """

    def __init__(self, name: str, host: str) -> None:
        """`host` is what this node listens on: one on the loopback opens no port beyond it. Raises
        `ConfigError`."""
        try:
            importlib.import_module("nixl")
            self._nixl: Any = importlib.import_module("nixl._bindings")
            config = self._nixl.nixlAgentConfig()
            config.useProgThread = True
            config.pthrDelay = _LOOK_MICROSECONDS
            config.useListenThread = False
            config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
            self._agent: Any = self._nixl.nixlAgent(name, config)
            self._backend: int = self._agent.createBackend("UCX", _settings(host))
        except ImportError as error:
            raise ConfigError(f"NIXL cannot be loaded: {error}; {INSTALL}") from error
        except Exception as error:
            raise ConfigError(
                f"NIXL cannot use this machine's network ({error or type(error).__name__}); what "
                "UCX wrote to the error stream says more, or choose --transport tcp"
            ) from error

    def register(self, address: int, size: int) -> None:
        """Pins memory, for as long as the agent lives."""
        pieces = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, size, 0, "")])
        self._agent.registerMem(pieces, [self._backend])

    def metadata(self) -> bytes:
        """What others need to read what is registered now."""
        return bytes(self._agent.getLocalMD())

    def meet(self, metadata: bytes) -> str:
        """Learns of another agent, or of more memory of it; returns its name.

        The bytes must be as the other agent made them: NIXL does not survive all others.
        """
        return bytes(self._agent.loadRemoteMD(metadata)).decode()

    def prepare(self, name: str, theirs: Sequence[Piece], mine: Sequence[Piece]) -> Request:
        """Makes ready to copy the pieces of another agent's memory to registered memory here, each
        to one of the same size. `release` follows."""
        nixl = self._nixl
        return Request(
            self._agent.createXferReq(
                nixl.NIXL_READ,
                self._pieces(mine),
                self._pieces(theirs),
                name,
                backend=[self._backend],
            )
        )

    def begin(self, request: Request) -> bool:
        """Begins to copy; whether that is done already."""
        return bool(self._agent.postXferReq(request.handle) == self._nixl.NIXL_SUCCESS)

    def done(self, request: Request) -> bool:
        """Whether it is; moves it on meanwhile."""
        return bool(self._agent.getXferStatus(request.handle) == self._nixl.NIXL_SUCCESS)

    def release(self, request: Request) -> None:
        """Forgets a request. One that is under way **goes on writing** to memory here."""
        self._agent.releaseXferReq(request.handle)

    def close(self) -> None:
        """Ends the agent: from here on nothing is written for it any more."""
        self._agent = None

    def _pieces(self, pieces: Sequence[Piece]) -> Any:
        return self._nixl.nixlXferDList(
            self._nixl.DRAM_SEG, [(address, size, 0) for address, size in pieces]
        )


def _listens(transports: str) -> bool:
    """Whether UCX takes connections over TCP, if it may use these transports."""
    names = transports.removeprefix("^").split(",")
    if transports.startswith("^"):
        return "tcp" not in names
    return "tcp" in names or "all" in names


def _settings(host: str) -> dict[str, str]:
    """UCX's, where the environment does not say otherwise. By itself UCX would listen for TCP on
    every address."""
    if chosen_transports() is None:
        return {"engine_config": "TLS=^tcp"}
    return {"engine_config": "NET_DEVICES=lo"} if is_loopback(host) else {}

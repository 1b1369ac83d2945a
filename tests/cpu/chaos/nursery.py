"""Workers that join: `python -m tests.cpu.chaos.nursery FOLDER` starts one for each line it reads.

A worker does what `fourfold worker --join` does, in a process forked from this one, which has
imported everything already: it joins within a fraction of the time. It also answers at a unix
socket what it holds. When a worker ends, a line says how; when the input ends, all are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import torch

import fourfold.engine.engine  # what a worker imports when it is told to load
import fourfold.engine.runner
import fourfold.models.loading  # noqa: F401
from fourfold.cli.worker import Options, run
from fourfold.cluster.config import LinkConfig
from fourfold.engine import worker
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Role
from fourfold.transport.config import TransportPath

WHERE = signal.SIGUSR2
"""The signal upon which a worker writes into its log where each of its threads is."""
_LOOK_SECONDS = 0.02


class Birth(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that there is to be."""

    name: str
    role: Role
    gateway: str
    """HOST:PORT to join."""
    port: int
    """Of its pages, on 127.0.0.1."""
    advertise: str
    path: TransportPath
    key_file: Path
    device: str
    engine: EngineConfig


class Born(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it: running as `pid`, or ended as `os.waitpid` says."""

    name: str
    pid: int
    status: int | None = None


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds of requests; nothing where none is under way."""

    moving: tuple[str, ...] = ()
    """Parts of requests that wait for pages, or for others to have them."""
    parts: int = 0
    """Of requests, wherever they are."""
    leases: tuple[str, ...] = ()
    sendings: tuple[str, ...] = ()
    transfers: int = 0
    landings: int = 0
    grants: int = 0


def main() -> None:
    folder = Path(sys.argv[1])
    children: dict[int, str] = {}
    try:
        _nurse(folder, children)
    finally:  # whoever asked for them may have died at any moment
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _nurse(folder: Path, children: dict[int, str]) -> None:
    """Gives birth to workers, and says who was born and who died, until nobody asks any more."""
    lines = os.fdopen(os.dup(0), "rb", buffering=0)
    waiting = b""
    while True:
        readable, _, _ = select.select([lines], [], [], _LOOK_SECONDS)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            _say(Born(name=children.pop(pid), pid=pid, status=status))
        if not readable:
            continue
        data = lines.read(1 << 16)
        if not data:
            return
        *whole, waiting = (waiting + data).split(b"\n")
        for line in whole:
            birth = msgspec.json.decode(line, type=Birth, dec_hook=_decode_path)
            pid = os.fork()
            if not pid:
                _live(birth, folder)
            children[pid] = birth.name
            _say(Born(name=birth.name, pid=pid))


def _decode_path(kind: type[Path], value: str) -> Path:
    return kind(value)


def _say(born: Born) -> None:
    os.write(1, msgspec.json.encode(born) + b"\n")


def _live(birth: Birth, folder: Path) -> None:
    """A worker's whole life, in a process of its own."""
    code = 1
    try:
        os.setsid()
        log = os.open(folder / f"{birth.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, target in enumerate((nothing, nothing, log)):
            os.dup2(target, number)
        _serve(birth, folder)
        code = 0
    except BaseException:
        logging.exception("the worker failed")
    finally:
        os._exit(code)


def _serve(birth: Birth, folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.register(WHERE)

    class Watched(worker.Worker):
        """One that can be asked."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            _answer(self, folder / f"{os.getpid()}.sock")

    patched: Any = worker
    patched.Worker = Watched
    run(
        Options(
            join=birth.gateway,
            role=birth.role,
            name=birth.name,
            device=birth.device,
            engine=birth.engine,
            port=birth.port,
            links=LinkConfig(
                key_file=birth.key_file, transport=birth.path, advertise=birth.advertise
            ),
        )
    )


def _answer(watched: worker.Worker, path: Path) -> None:
    """Tells whoever connects what the worker holds."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        while True:
            asker, _ = listening.accept()
            with asker, contextlib.suppress(OSError):
                asker.sendall(msgspec.json.encode(_holdings(watched)))

    threading.Thread(target=serve, name="holdings", daemon=True).start()


def _holdings(watched: worker.Worker) -> Holdings:
    engine, node = watched._engine, watched._node
    if engine is None or node is None or engine._handover is None:
        return Holdings()
    handover = engine._handover
    return Holdings(
        moving=tuple(
            f"{number} {sequence.stage.value}, {sequence.computed} of {sequence.given} computed"
            for number, sequence in list(engine.scheduler.moving.items())
        ),
        parts=len(engine.scheduler._parts),
        leases=tuple(
            f"{number}: {lease.missing} runs missing, over {lease.over}, {lease.problem}"
            for number, lease in list(node._leases._leases.items())
        ),
        sendings=tuple(
            f"{number}: {sending._stored} stored, {sending._sent} sent"
            for number, sending in list(handover._sendings.items())
        ),
        transfers=sum(len(link._transfers._transfers) for link in list(node._links.values())),
        landings=len(handover._landings),
        grants=len(handover._grants),
    )


if __name__ == "__main__":
    main()

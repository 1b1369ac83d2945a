"""The workers that joined: their processes, and the relays through which they are reached."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from fourfold.engine.messages import Role
from fourfold.transport.config import TransportPath
from tests.cpu.chaos.nursery import Birth, Born, Holdings
from tests.cpu.chaos.relay import Network, Relay, Trouble
from tests.cpu.chaos.served import Served
from tests.cpu.chaos.story import Story

_SEEN_AS = "127.0.0.2"
"""Where workers' relays listen, on the ports that the workers themselves have at 127.0.0.1."""
_PATIENCE = 20.0


@dataclasses.dataclass(eq=False)
class Joiner:
    """A worker that joins by itself, under one name for ever."""

    name: str
    role: Role
    path: TransportPath
    door: Relay
    """To the gateway."""
    pages: Relay
    """To its pages."""
    pid: int = 0
    """0 while there is no process."""
    killed: bool = False
    leaving: bool = False
    """It was told to leave, and is to end in good order."""


class Crew:
    """Keeps all joiners alive. To be used on one loop."""

    def __init__(
        self,
        network: Network,
        folder: Path,
        key_file: Path,
        served: Served,
        story: Story,
        rng: random.Random,
        on_frame: Callable[[str, Trouble | None], None],
    ) -> None:
        """`on_frame` is called with a worker's name, in the network's thread, for each frame of
        pages that comes to it and what happens to it."""
        self.joiners: dict[str, Joiner] = {}
        self._network, self._folder, self._story, self._rng = network, folder, story, rng
        self._on_frame, self._key_file, self._served = on_frame, key_file, served
        self._gateway = ("127.0.0.1", 1)
        self._ending = False
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.cpu.chaos.nursery", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._births: asyncio.Task[None] | None = None

    def start(self, gateway: tuple[str, int]) -> None:
        """Listens to births and deaths on the running loop; workers join at `gateway`."""
        self._gateway = gateway
        for joiner in self.joiners.values():
            joiner.door.target = gateway
        self._births = asyncio.get_running_loop().create_task(self._listen())

    def add(self, name: str, role: Role, path: TransportPath) -> Joiner:
        """One more, whose process is started at once."""
        door = Relay(self._network, self._gateway, self._rng)
        pages = Relay(self._network, ("127.0.0.1", 0), self._rng, _SEEN_AS)
        pages.target = ("127.0.0.1", pages.port)
        pages.on_frame = functools.partial(self._on_frame, name)
        joiner = self.joiners[name] = Joiner(name, role, path, door, pages)
        self._give_birth(joiner)
        return joiner

    def by_pid(self, pid: int) -> Joiner | None:
        return next((joiner for joiner in self.joiners.values() if joiner.pid == pid), None)

    def signal(self, joiner: Joiner, number: signal.Signals) -> None:
        """Signals a process, if there is one."""
        if joiner.pid:
            # A second SIGTERM ends a worker at once.
            joiner.killed |= number is signal.SIGKILL
            joiner.killed |= number is signal.SIGTERM and joiner.leaving
            joiner.leaving |= number is signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.kill(joiner.pid, number)

    async def holdings(self, joiner: Joiner) -> Holdings | None:
        """What a process holds; None where it has none to ask."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._folder / f"{joiner.pid}.sock")
            try:
                data = await asyncio.wait_for(reader.read(), _PATIENCE)
            finally:
                writer.close()
            return msgspec.json.decode(data, type=Holdings) if data else None
        except OSError:
            return None

    def close(self) -> None:
        """Ends all processes."""
        self._ending = True
        assert self._nursery.stdin is not None
        for joiner in self.joiners.values():
            self.signal(joiner, signal.SIGKILL)
        self._nursery.stdin.close()
        try:
            self._nursery.wait(_PATIENCE)
        finally:
            self._nursery.kill()
        if self._births is not None:
            self._births.cancel()
        for joiner in self.joiners.values():
            joiner.door.close()
            joiner.pages.close()

    def log_of(self, name: str, lines: int) -> str:
        """The last lines that a worker wrote."""
        path = self._folder / f"{name}.log"
        if not path.exists():
            return ""
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])

    def _give_birth(self, joiner: Joiner) -> None:
        birth = Birth(
            name=joiner.name,
            role=joiner.role,
            gateway=f"127.0.0.1:{joiner.door.port}",
            port=joiner.pages.port,
            advertise=_SEEN_AS,
            path=joiner.path,
            key_file=self._key_file,
            device=self._served.device,
            engine=self._served.engine,
        )
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(msgspec.json.encode(birth, enc_hook=str) + b"\n")
        self._nursery.stdin.flush()

    async def _listen(self) -> None:
        assert self._nursery.stdout is not None
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._nursery.stdout
        )
        while line := await reader.readline():
            born = msgspec.json.decode(line, type=Born)
            joiner = self.joiners[born.name]
            if born.status is None:
                self._story.tell(f"{born.name} is process {born.pid}")
                joiner.pid, joiner.killed, joiner.leaving = born.pid, False, False
                continue
            code = os.waitstatus_to_exitcode(born.status)
            self._story.tell(f"{born.name} ended with {code}")
            # Just born, it has not told the system yet what SIGTERM is to do.
            left = joiner.leaving and code in (0, -signal.SIGTERM)
            expected = joiner.killed or left
            if not expected and not self._ending:
                log = self.log_of(born.name, 30)
                self._story.violate("crashed", f"{born.name} ended with {code}: {log}")
            joiner.pid = 0
            if expected and not self._ending:
                self._give_birth(joiner)
        if not self._ending:
            self._story.violate("crashed", "the nursery ended")


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True

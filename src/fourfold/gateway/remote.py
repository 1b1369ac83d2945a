"""An engine in a process of its own, so that Python's lock here never delays a step there.

The process is started over a socket that it inherits and ends with either side: when this process
has gone, however it went, the engine reads the end of the socket and leaves its GPU; when the
engine has gone, every request is told so.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from fourfold import errors
from fourfold.engine.building import EngineSetup, ModelFacts, Progress
from fourfold.engine.channel import (
    Channel,
    FromEngine,
    Load,
    LoadFailed,
    News,
    Ready,
    Stop,
    ToEngine,
    encode,
)
from fourfold.engine.channel import Progress as ProgressMade
from fourfold.engine.messages import Abort, EngineStats, Submit
from fourfold.errors import FourfoldError
from fourfold.gateway.gateway import Emit, Gateway
from fourfold.gateway.local import GatewaySetup, assemble
from fourfold.gateway.tokenizer import load_tokenizer

_LAST_STEP = 30.0
"""Seconds that a running step and the end of its process may take before it is killed."""
_OBITUARY = 5.0
"""Seconds to wait for the exit code of a process whose socket has closed."""


def make_remote_gateway(
    setup: GatewaySetup, progress: Progress = lambda done, total: None
) -> Gateway:
    """As `make_gateway`, with model and engine in another process."""
    engine = RemoteEngine(setup.engine)
    try:
        tokenizer = load_tokenizer(setup.tokenizer)  # while the model is loading there
        model = engine.wait_until_ready(progress)
        gateway = assemble(setup, engine, tokenizer, model)
    except BaseException:
        engine.kill()
        raise
    engine.on_death = gateway.fail
    return gateway


class RemoteEngine:
    """Implements `EngineClient`; once started, to be used on the loop it was started on."""

    def __init__(self, setup: EngineSetup) -> None:
        """Starts the process and has it load; `wait_until_ready` must follow."""
        self.stats = EngineStats()
        self.max_context = 0
        self.on_death: Callable[[FourfoldError], None] = lambda error: None
        """Called on the loop when the process has ended without being told to."""
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fourfold.engine.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                process_group=0,  # Ctrl-C is for this process, which lets requests finish
            )
        self._channel: Channel[FromEngine] = Channel(self._connection, FromEngine)
        self._channel.send(Load(setup))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._emit: Emit | None = None
        self._outgoing: list[bytes] = []
        self._stopping = self._closed = False

    def wait_until_ready(self, progress: Progress) -> ModelFacts:
        """Waits until the engine takes requests. Raises what `build_engine` raises there."""
        while True:
            try:
                messages = self._channel.receive()
            except EOFError:
                raise FourfoldError(
                    f"the engine's process {self._end()} while it was loading; what it wrote "
                    "before says why"
                ) from None
            for message in messages:
                match message:
                    case ProgressMade():
                        progress(message.done, message.total)
                    case LoadFailed():
                        raise _error(message)
                    case Ready():
                        self.max_context, self.stats = message.max_context, message.stats
                        return message.model

    def start(self, emit: Emit) -> None:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._connection.setblocking(False)
        self._loop.add_reader(self._connection, self._read)

    def submit(self, request: Submit) -> None:
        self._say(request)

    def abort(self, message: Abort) -> None:
        self._say(message)

    def stop(self) -> None:
        """Ends the process once its running step is done; may be called from any thread while the
        loop runs."""
        self._stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._say, Stop())
            try:
                self._process.wait(_LAST_STEP)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._loop.call_soon_threadsafe(self._close)
        else:
            self.kill()

    def kill(self) -> None:
        """Ends the process at once; before `start` only."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except BlockingIOError:
            return
        except EOFError:
            self._close()
            if not self._stopping:
                end = self._end()
                self.on_death(FourfoldError(f"the engine's process {end}; start the server again"))
            return
        for message in messages:
            assert isinstance(message, News)
            assert self._emit is not None
            self.stats = message.stats
            if message.outputs:
                self._emit(message.outputs, message.time)

    def _say(self, message: ToEngine) -> None:
        """Queues a message; what is queued in one turn of the loop is sent together."""
        if self._closed:
            return
        assert self._loop is not None
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(encode(message))

    def _flush(self) -> None:
        if self._closed:
            return
        assert self._loop is not None
        data = b"".join(self._outgoing)
        try:
            left = data[self._connection.send(data) :]
        except BlockingIOError:
            left = data
        except OSError:  # reading will say so too
            left = b""
        self._outgoing = [left] if left else []
        if left:
            self._loop.add_writer(self._connection, self._flush)
        else:
            self._loop.remove_writer(self._connection)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        assert self._loop is not None
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()

    def _end(self) -> str:
        """How the process ended: the end of a sentence."""
        try:
            code = self._process.wait(_OBITUARY)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its end of the line"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = "; perhaps memory ran out" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"


def _error(message: LoadFailed) -> FourfoldError:
    kind: type[FourfoldError] = getattr(errors, message.kind)
    return kind(message.message)

"""Processes that train runs at the same time, one on each GPU.

A worker trains one run after the other, so that starting it is paid for once. One that dies takes
its run with it and no other: the next run gets a new process. A worker ends with the process that
started it, however that ends.

Imports nothing heavy: a worker's variables are set before torch reads them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from fourfold.train.law.grid import Grid, Run, RunFailedError

Train = Callable[[Path, Run], None]
"""Trains a run by its grid's base configuration. RunFailedError where that cannot be."""
_LEAVING_SECONDS = 10.0
"""Until a process that has let go of its pipe is ended, and its own exit code lost."""


class Worker:
    """A process that trains what it is called with. Close it to end the process."""

    def __init__(self, grid: Grid, train: Train, log: Path, environment: Mapping[str, str]) -> None:
        """
        Args:
            grid: whose runs it trains, each for no longer than the grid's timeout.
            train: a function of a module, which the process imports.
            log: takes all that the process prints.
            environment: variables that are set in the process.
        """
        self._grid, self._train, self._log = grid, train, log
        self._environment = dict(environment)
        self._running: tuple[SpawnProcess, Connection] | None = None
        self._closed = False
        # It is closed by another thread than is waiting for a run.
        self._changing = threading.Lock()

    def __call__(self, run: Run) -> None:
        """Trains a run to its end. RunFailedError where that cannot be, or takes too long."""
        with self._changing:
            if self._closed:
                raise RunFailedError("the sweep was ended before it")
            if self._running is None:
                self._running = self._start()
            process, pipe = self._running
        try:
            pipe.send(run)
            if not pipe.poll(self._grid.timeout):
                self._end()
                raise RunFailedError(f"it took more than {self._grid.timeout:g} s")
            failure: str | None = pipe.recv()
        except (EOFError, OSError):
            process.join(_LEAVING_SECONDS)
            self._end()
            raise RunFailedError(
                f"its process ended with {process.exitcode}; {self._log} has what it said"
            ) from None
        if failure is not None:
            raise RunFailedError(failure)

    def _start(self) -> tuple[SpawnProcess, Connection]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        arguments = (its, self._grid.base, self._train, self._log, self._environment)
        process = context.Process(target=_serve, args=arguments)
        process.start()
        its.close()
        return process, mine

    def close(self) -> None:
        """Ends the process, and with it the run that it trains; harmless when repeated."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        with self._changing:
            if self._running is None:
                return
            process, pipe = self._running
            self._running = None
            process.kill()
            process.join()
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _serve(
    pipe: Connection, base: Path, train: Train, log: Path, environment: Mapping[str, str]
) -> None:
    """What a worker's process does: answers each run with None, or why it failed."""
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # Ctrl-C reaches all processes of a terminal; whoever started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run: Run = pipe.recv()
        except EOFError:
            return
        failure: str | None = None
        try:
            train(base, run)
        except RunFailedError as error:
            failure = str(error)
        pipe.send(failure)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def environments(workers: int, gpus: int) -> list[dict[str, str]]:
    """Variables for each of so many workers: the GPU that it sees, in turn, where there are some,
    and its share of the cores."""
    cores = max(1, (os.cpu_count() or 1) // workers)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    if not gpus:
        return [threads] * workers
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(gpus))) if seen is None else seen.split(",")
    return [
        threads | {"CUDA_VISIBLE_DEVICES": names[number % gpus].strip()}
        for number in range(workers)
    ]

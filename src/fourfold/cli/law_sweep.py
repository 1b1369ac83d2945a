"""`fourfold law sweep`: trains every model of a grid that has no record yet."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.errors import ConfigError, FourfoldError
from fourfold.train.law.config import SweepConfig as Options

if TYPE_CHECKING:
    from fourfold.train.law.grid import Grid, Run
    from fourfold.train.law.sweep import Launch

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.train.law.grid import read_grid
    from fourfold.train.law.sweep import is_done, sweep

    grid = read_grid(options.grid)
    chosen = [cell for cell in grid.cells if options.only in cell.name]
    if not chosen:
        raise ConfigError(f"--only {options.only}: no run's name holds that; --list shows them")
    if options.list:
        for cell in chosen:
            print(f"{'done' if is_done(grid, cell) else 'missing':<8} {cell.name}")
        return 0
    try:
        with _launches(grid, options.workers) as launches:
            missing = sweep(grid, launches, _tell, only=options.only)
    except OSError as error:
        out = grid.records.parent
        raise ConfigError(f"{out} cannot be written ({error}); set the grid's `out`") from error
    done = sum(is_done(grid, cell) for cell in grid.cells)
    _tell(f"{grid.records}: {done} of {len(grid.cells)} runs")
    return 1 if missing else 0


def _tell(line: str) -> None:
    # In one piece: several threads tell.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _launches(grid: Grid, workers: int | None) -> Iterator[Sequence[Launch]]:
    """What trains runs, each its own at the same time as the others theirs."""
    from fourfold.train.law.workers import Worker, environments

    if grid.command:
        if workers not in (None, 1):
            raise ConfigError(
                f"--workers {workers}: the grid's `command` may use all GPUs, so it trains one run "
                "at a time; leave out either"
            )
        yield [_commands(grid)]
        return
    gpus = _gpus(grid)
    count = workers or max(1, gpus)
    if count == 1:
        yield [lambda run: train_here(grid.base, run)]
        return
    with contextlib.ExitStack() as stack:
        made = [
            Worker(grid, train_here, grid.logs / f"worker-{number}.log", environment)
            for number, environment in enumerate(environments(count, gpus))
        ]
        _tell(f"{count} at the same time; what they say is in {grid.logs}")
        yield [stack.enter_context(worker) for worker in made]


def _gpus(grid: Grid) -> int:
    """GPUs that runs may be dealt to: none where a run names its device."""
    import torch

    if any(cell.config.run.device not in ("auto", "cuda") for cell in grid.cells):
        return 0
    return torch.cuda.device_count()


def train_here(base: Path, run: Run) -> None:
    """Trains a run in this process: no time goes to starting one. RunFailedError where it fails."""
    import torch

    from fourfold.cli import train
    from fourfold.train.law.grid import RunFailedError

    try:
        train.run(train.Options(config=base, set=run.overrides))
    except (FourfoldError, torch.OutOfMemoryError) as error:
        raise RunFailedError(str(error)) from error
    finally:
        if run.config.run.compile:
            # What was compiled for other models counts against how often code may be compiled.
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _commands(grid: Grid) -> Callable[[Run], None]:
    """Trains each run by a command of its own. ConfigError where there is no such command."""
    from fourfold.train.law.grid import RunFailedError, arguments

    def launch(run: Run) -> None:
        words = [*grid.command, *arguments(grid, run)]
        try:
            done = subprocess.run(words, timeout=grid.timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunFailedError(f"it took more than {grid.timeout:g} s") from error
        except OSError as error:
            raise ConfigError(
                f"{words[0]} cannot be started ({error}); mend the grid's `command`"
            ) from error
        if done.returncode:
            raise RunFailedError(f"its command ended with {done.returncode}")

    return launch

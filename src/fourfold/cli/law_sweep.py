"""`fourfold law sweep`: trains every model of a grid that has no record yet."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fourfold.errors import FourfoldError
from fourfold.train.law.config import SweepConfig as Options

if TYPE_CHECKING:
    from fourfold.train.law.grid import Grid, Run

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.train.law.grid import read_grid
    from fourfold.train.law.sweep import is_done, sweep

    grid = read_grid(options.grid)
    if options.list:
        for cell in grid.cells:
            if options.only in cell.name:
                print(f"{'done' if is_done(grid, cell) else 'missing':<8} {cell.name}")
        return 0
    launch = _commands(grid) if grid.command else _in_process(grid)
    missing = sweep(
        grid, launch, lambda line: print(line, file=sys.stderr, flush=True), only=options.only
    )
    done = sum(is_done(grid, cell) for cell in grid.cells)
    print(f"{grid.records}: {done} of {len(grid.cells)} runs", file=sys.stderr)
    return 1 if missing else 0


def _in_process(grid: Grid) -> Callable[[Run], None]:
    """Trains runs here: no time goes to starting, and a crash ends the sweep."""
    import torch

    from fourfold.cli import train
    from fourfold.train.law.sweep import RunFailedError

    def launch(run: Run) -> None:
        try:
            train.run(train.Options(config=grid.base, set=run.overrides))
        except (FourfoldError, torch.OutOfMemoryError) as error:
            raise RunFailedError(str(error)) from error
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return launch


def _commands(grid: Grid) -> Callable[[Run], None]:
    """Trains each run by a command of its own."""
    from fourfold.train.law.grid import arguments
    from fourfold.train.law.sweep import RunFailedError

    def launch(run: Run) -> None:
        words = [*grid.command, *arguments(grid, run)]
        try:
            done = subprocess.run(words, timeout=grid.timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunFailedError(f"it took more than {grid.timeout:g} s") from error
        except OSError as error:
            raise RunFailedError(f"{words[0]} cannot be started ({error})") from error
        if done.returncode:
            raise RunFailedError(f"its command ended with {done.returncode}")

    return launch

"""Chains are trained at the same time by processes of their own, and none takes others with it.

Only the last test trains; elsewhere a process does what a name says.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourfold.cli.main import run as command
from fourfold.train.law.grid import Grid, Run, RunFailedError
from fourfold.train.law.records import read_records
from fourfold.train.law.sweep import sweep
from fourfold.train.law.workers import Worker, environments
from tests.cpu.train.law.test_sweep import corpus, leave, make, quiet

__all__ = ["corpus", "make"]  # fixtures
# A process takes long to start where there is much else to do.
PATIENCE = 280.0
pytestmark = pytest.mark.timeout(300)
# As the second model has two chains, there are four: of one run, one, two and two.
GRID = """
base = "base.toml"
out = "runs"
tokens = [640, 320]
ratios = [1, 4]
{more}
[[model]]
name = "wide"
set = {{ "model.width" = 64 }}
tokens = [320]
[[model]]
name = "small"
set = {{ "optimizer.rate" = 1e-3 }}
"""


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def pretend(base: Path, run: Run) -> None:
    """Trains nothing, in a worker's process."""
    print("training", run.name, os.environ["NUMBER"], flush=True)
    if run.name == "wide-x4-320-s0" and not (base.parent / "died").exists():
        (base.parent / "died").touch()
        os._exit(7)
    if run.name == "small-x4-320-s0":
        raise RunFailedError("it fell over")
    leave(run)


def together(base: Path, run: Run) -> None:
    """Does not end before another worker has begun."""
    (base.parent / f"begun-{os.environ['NUMBER']}").touch()
    wait_for(lambda: len(list(base.parent.glob("begun-*"))) == 2)
    leave(run)


def endless(base: Path, run: Run) -> None:
    (base.parent / f"endless-{os.getpid()}").touch()
    time.sleep(3600)


def alive(pid: int) -> bool:
    """Whether a process is there, and not only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def workers(grid: Grid, train: Callable[[Path, Run], None], count: int) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Worker(grid, train, grid.logs / f"{number}.log", {"NUMBER": str(number)})
            )
            for number in range(count)
        ]


def test_a_process_that_dies_takes_one_run_with_it(make: Callable[..., Grid]) -> None:
    grid = make(grid=GRID)
    with workers(grid, pretend, 1) as launches:
        missing = sweep(grid, launches, quiet)
        assert missing.pop("small-x4-320-s0") == "it fell over"
        assert list(missing) == ["wide-x4-320-s0"]
        assert "its process ended with 7" in missing["wide-x4-320-s0"]
        assert "training wide-x4-320-s0 0" in (grid.logs / "0.log").read_text()
        assert len(read_records(grid.records)) == 4
        assert list(sweep(grid, launches, quiet)) == ["small-x4-320-s0"]
    assert len(read_records(grid.records)) == 5


def test_chains_are_trained_at_the_same_time(make: Callable[..., Grid]) -> None:
    grid = make(grid=GRID)
    said: list[str] = []
    with workers(grid, together, 2) as launches:
        assert sweep(grid, launches, said.append) == {}
    assert len(read_records(grid.records)) == len(grid.cells) == 6
    # What costs most is begun first.
    begun = [line.removeprefix("training ") for line in said if line.startswith("training ")]
    assert {name.split("-")[0] for name in begun[:2]} == {"wide"}


def test_what_takes_too_long_is_ended(make: Callable[..., Grid]) -> None:
    grid = make(grid=GRID, more="timeout = 1.0")
    with workers(grid, endless, 1) as launches:
        missing = sweep(grid, launches, quiet, only="wide-x1")
    assert missing == {"wide-x1-320-s0": "it took more than 1 s"}


SCRIPT = """
import sys
from pathlib import Path
from fourfold.train.law.grid import read_grid
from fourfold.train.law.sweep import sweep
from tests.cpu.train.law import test_workers
grid = read_grid(Path(sys.argv[1]))
with test_workers.workers(grid, test_workers.endless, 2) as launches:
    sweep(grid, launches, print)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_workers_end_with_their_sweep(how: str, make: Callable[..., Grid], tmp_path: Path) -> None:
    make(grid=GRID)
    folder = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / "grid.toml")], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(list(folder.glob("endless-*"))) == 2)
        working = [int(path.name.split("-")[1]) for path in folder.glob("endless-*")]
        assert all(map(alive, working))
        (process.kill if how == "kill" else lambda: process.send_signal(2))()
        process.wait(PATIENCE)
        wait_for(lambda: not any(map(alive, working)))
    finally:
        process.kill()


def test_each_worker_sees_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    seen = [each["CUDA_VISIBLE_DEVICES"] for each in environments(3, 2)]
    assert seen == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    seen = [each["CUDA_VISIBLE_DEVICES"] for each in environments(2, 2)]
    assert seen == ["5", "GPU-a"]
    assert environments(4, 0) == [{"OMP_NUM_THREADS": "2"}] * 4


def test_a_worker_sets_its_variables_before_torch_reads_them() -> None:
    loads = "import sys, fourfold.train.law.workers, fourfold.cli.law_sweep as cli; cli.train_here"
    subprocess.run(
        [sys.executable, "-c", f"{loads}; assert 'torch' not in sys.modules"], check=True
    )


def test_several_workers_give_the_records_of_one(
    make: Callable[..., Grid], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for folder, options in (("one", []), ("two", ["--workers", "2"])):
        make(folder, grid=GRID)
        assert command(["law", "sweep", str(tmp_path / folder / "grid.toml"), *options]) == 0
        assert "6 of 6 runs" in capsys.readouterr().err
        records = read_records(tmp_path / folder / "runs/records")
        losses.append({record.name: record.loss for record in records})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "held-out loss" in (tmp_path / "two/runs/logs/worker-1.log").read_text()
    assert not list((tmp_path / "two/runs").glob("*/checkpoints"))


def test_a_command_is_alone(
    make: Callable[..., Grid], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(more='command = ["torchrun"]', grid=GRID)
    grid = str(tmp_path / "sweep/grid.toml")
    assert command(["law", "sweep", grid, "--workers", "2"]) == 2
    assert "--workers 2" in capsys.readouterr().err

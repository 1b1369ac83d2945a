"""Chains are trained at the same time by processes of their own, and none takes others with it.

Only one test trains; elsewhere a process does what a name says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourfold.cli.main import run as command
from fourfold.train.law.grid import Grid, Run
from fourfold.train.law.records import read_records
from fourfold.train.law.sweep import sweep
from fourfold.train.law.workers import Worker, environments
from tests.cpu.train.law.pretending import PATIENCE, endless, some_fail, together, wait_for
from tests.cpu.train.law.test_sweep import corpus, make, quiet

__all__ = ["corpus", "make"]  # fixtures
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
    with workers(grid, some_fail, 1) as launches:
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
import os, sys
from pathlib import Path
from fourfold.train.law.grid import read_grid
from fourfold.train.law.sweep import sweep
from tests.cpu.train.law.pretending import endless
from tests.cpu.train.law.test_workers import workers
other = os.fork()  # two sweeps, for which all is imported once
if other:
    print(other, flush=True)
grid = read_grid(Path(sys.argv[1 if other else 2]))
with workers(grid, endless, 2) as launches:
    sweep(grid, launches, lambda line: None)
"""


def test_workers_end_with_their_sweep(make: Callable[..., Grid], tmp_path: Path) -> None:
    names = ("interrupted", "killed")
    for name in names:
        make(name, grid=GRID)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name / "grid.toml") for name in names)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        killed = int(process.stdout.readline())
        wait_for(lambda: len(list(tmp_path.glob("*/endless-*"))) == 4)
        interrupted_s, killed_s = (
            [int(path.name.split("-")[1]) for path in (tmp_path / name).glob("endless-*")]
            for name in names
        )
        assert all(map(alive, interrupted_s + killed_s))
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, killed_s)))
        assert all(map(alive, interrupted_s))
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        wait_for(lambda: not any(map(alive, interrupted_s)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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

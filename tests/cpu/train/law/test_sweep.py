"""A sweep trains what has no record, and what is missing is missing.

Most runs here are not trained: what `fourfold train` leaves is written instead.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fourfold.cli.main import run as command
from fourfold.errors import ConfigError
from fourfold.train.data.grammar import Grammar, write_grammar
from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.law.grid import Grid, Run, RunFailedError, read_grid
from fourfold.train.law.records import read_records
from fourfold.train.law.sweep import is_done, sweep
from tests.cpu.train.law.pretending import leave

BASE = """
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
head_width = 8
experts = 8
experts_per_token = 2
expert_width = 8
[data]
train = "{corpus}/train"
held_out = "{corpus}/held-out"
length = 16
rows = 2
[schedule]
steps = 10
warmup = 2
[run]
folder = "none"
evaluate_batches = 1
device = "cpu"
"""
GRID = """
base = "base.toml"
out = "runs"
tokens = [640, 320]
ratios = [1, 4]
{more}
[[model]]
name = "small"
set = {{ "optimizer.rate" = 1e-3 }}
[[model]]
name = "wide"
set = {{ "model.width" = 32, "router.z_loss" = 1e-3 }}
tokens = [320]
ratios = [4]
"""
PUBLISHED = Path(__file__).parents[4] / "benchmarks/law"
NAMES = ["small-x1-320-s0", "small-x1-640-s0", "small-x4-320-s0", "small-x4-640-s0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    grammar = Grammar(GrammarConfig(levels=2, symbols=4, rules=2, words=4))
    for stream, split in enumerate(("train", "held-out")):
        write_grammar(grammar, path / split, split, stream, 2000)
    return path


@pytest.fixture
def make(tmp_path: Path, corpus: Path) -> Callable[..., Grid]:
    def make(folder: str = "sweep", more: str = "", grid: str = GRID) -> Grid:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "base.toml").write_text(BASE.format(corpus=corpus))
        (path / "grid.toml").write_text(grid.format(more=more))
        return read_grid(path / "grid.toml")

    return make


class Pretending:
    """Leaves what a run would; fails or is killed where it is told to."""

    def __init__(self, *, fails: str = "", killed_at: int = 10**9) -> None:
        self.trained: list[str] = []
        self._fails = fails
        self._killed_at = killed_at

    def __call__(self, run: Run) -> None:
        if len(self.trained) == self._killed_at:
            raise KeyboardInterrupt
        if self._fails and run.name.startswith(self._fails):
            raise RunFailedError("it fell over")
        start = run.config.run.start_from
        assert start is None or Path(start).is_dir(), start
        self.trained.append(run.name)
        leave(run)


def quiet(line: str) -> None:
    """Tells nobody."""


def test_a_grid_is_all_its_runs(make: Callable[..., Grid]) -> None:
    grid = make()
    assert [cell.name for cell in grid.cells] == [*NAMES, "wide-x4-320-s0"]
    dense, sparse, wide = grid.cells[0], grid.cells[2], grid.cells[4]
    assert (dense.config.model.form, sparse.config.model.form) == ("dense", "sparse")
    assert dense.config.model.active_width == sparse.config.model.active_width
    assert (sparse.config.model.experts, sparse.config.schedule.steps) == (8, 10)
    assert (wide.config.model.width, wide.config.router.z_loss) == (32, 1e-3)
    assert wide.config.optimizer.rate != sparse.config.optimizer.rate == 1e-3
    [chain] = [chain for chain in grid.chains if chain.name == "small-x4-s0"]
    # The last fifth decays.
    assert [stretch.config.schedule.steps for stretch in chain.stretches] == [8, 16]
    assert [stretch.config.schedule.decay for stretch in chain.stretches] == [0.0, 0.0]
    assert chain.cells[1].config.run.start_from == str(chain.stretches[1].checkpoint)
    assert chain.stretches[1].config.run.start_from == str(chain.stretches[0].checkpoint)
    assert not grid.chains[-1].stretches
    assert wide.config.run.start_from is None


def test_a_killed_sweep_goes_on_where_it_was(make: Callable[..., Grid]) -> None:
    grid = make()
    killed = Pretending(killed_at=4)
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, [killed], quiet)
    assert len(read_records(grid.records)) == 2
    before = {path: path.stat().st_mtime_ns for path in grid.records.iterdir()}
    after = Pretending()
    assert sweep(grid, [after], quiet) == {}
    assert killed.trained + after.trained == [
        name
        for chain in ("small-x1", "small-x4")
        for name in (
            f"{chain}-s0-stable-8",
            f"{chain}-320-s0",
            f"{chain}-s0-stable-16",
            f"{chain}-640-s0",
        )
    ] + ["wide-x4-320-s0"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [r.name for r in read_records(grid.records)] == [*NAMES, "wide-x4-320-s0"]
    idle = Pretending()
    assert sweep(grid, [idle], quiet) == {}
    assert not idle.trained
    assert not list(grid.records.parent.glob("*/checkpoints"))


def test_a_record_tells_what_was_trained(make: Callable[..., Grid]) -> None:
    grid = make()
    sweep(grid, [Pretending()], quiet)
    records = {record.name: record for record in read_records(grid.records)}
    sparse, dense = records["small-x4-640-s0"], records["small-x1-640-s0"]
    experts = 3 * 16 * 8
    assert sparse.total - sparse.active == 6 * experts
    assert dense.total == dense.active == sparse.active - 8 * 16  # the router's
    assert sparse.tokens == 20 * 30
    assert sparse.loss == 3.05
    assert sparse.tokens_per_second == 250.0
    assert sparse.mfu is msgspec.UNSET
    assert (sparse.chain, sparse.ratio, sparse.bytes_per_token) == ("small-x4-s0", 4, 1.0)
    assert sparse.chosen == dense.chosen == 2


def test_a_run_that_fails_is_missing(make: Callable[..., Grid]) -> None:
    grid = make()
    failing = Pretending(fails="small-x1-s0-stable-16")
    missing = sweep(grid, [failing], quiet)
    assert missing == {"small-x1-640-s0": "it fell over"}
    assert [r.name for r in read_records(grid.records)] == [
        name for name in (*NAMES, "wide-x4-320-s0") if name != "small-x1-640-s0"
    ]
    # What it was to go on from is kept.
    assert grid.chains[0].stretches[0].checkpoint.is_dir()
    again = Pretending()
    assert sweep(grid, [again], quiet) == {}
    assert again.trained == ["small-x1-s0-stable-16", "small-x1-640-s0"]


@pytest.mark.parametrize(
    ("kept", "complaint"), [("", "no held-out loss"), ('"held_out_loss":0.0', "a loss of 0.0")]
)
def test_a_loss_that_is_none_is_missing(
    make: Callable[..., Grid], kept: str, complaint: str
) -> None:
    grid = make()

    def losing(run: Run) -> None:
        leave(run)
        path = run.folder / "metrics.jsonl"
        *steps, last = path.read_text().splitlines()
        last = last.replace('"held_out_loss":3.1', kept) if kept else ""
        path.write_text("\n".join([*steps, last]))

    missing = sweep(grid, [losing], quiet, only="wide")
    assert list(missing) == ["wide-x4-320-s0"]
    assert complaint in missing["wide-x4-320-s0"]
    assert not grid.records.exists()


def test_records_of_another_configuration_are_refused(make: Callable[..., Grid]) -> None:
    sweep(make(), [Pretending()], quiet)
    changed = make(more="sparse = { 'router.z_loss' = 0.5 }")
    with pytest.raises(ConfigError, match=r"small-x4-320-s0\.json is of a run with another"):
        sweep(changed, [Pretending()], quiet)


def test_what_changes_no_result_makes_no_other_run(make: Callable[..., Grid]) -> None:
    grid = make()
    sweep(grid, [Pretending()], quiet)
    same = """
    "run.log_every" = 3, "run.keep" = 7, "run.save_every" = 9, "run.cuda_graph" = false,
    "optimizer.beta1" = 0.9, "parallel.timeout" = 9.0"""
    fields = "{" + " ".join(same.split()) + "}"
    again = make(more=f"sparse = {fields}\ndense = {fields}")
    assert again.cells[0].config != grid.cells[0].config
    assert all(is_done(again, cell) for cell in again.cells)
    for changed in ("'optimizer.beta1' = 0.8", "'run.evaluate_batches' = 2", "'data.seed' = 1"):
        other = make(more=f"sparse = {{ {changed} }}\ndense = {{ {changed} }}")
        with pytest.raises(ConfigError, match="is of a run with another configuration"):
            is_done(other, other.cells[0])


def test_published_records_are_those_of_the_published_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a field of training that has a default has come."""
    folder = tmp_path / "benchmarks/law"
    folder.mkdir(parents=True)
    for name in ("grid.toml", "base.toml"):
        shutil.copy(PUBLISHED / name, folder)
    shutil.copytree(PUBLISHED / "records", tmp_path / "law/records")
    assert command(["law", "sweep", str(folder / "grid.toml"), "--list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == 57
    assert {done for done, _ in listed} == {"done"}


def test_a_stable_phase_of_another_configuration_is_refused(make: Callable[..., Grid]) -> None:
    """Runs that are missing would branch from it."""
    sweep(make(), [Pretending(fails="small-x4-640")], quiet)
    (make().records / "small-x4-320-s0.json").unlink()
    changed = make(more="sparse = { 'router.z_loss' = 0.5 }")
    with pytest.raises(ConfigError, match=r"small-x4-s0-stable-8 is of a run with another"):
        sweep(changed, [Pretending()], quiet, only="small-x4")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("/train", "/none"), "none holds no finished shards .*; run `fourfold tokenize`"),
        (("/held-out", "/none"), "none holds no finished shards"),
        (('"cpu"', '"cuda:99"'), "cuda:99"),
    ],
)
def test_what_is_no_fault_of_one_run_is_said_once(
    make: Callable[..., Grid],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    complaint: str,
) -> None:
    grid = make()
    base = tmp_path / "sweep/base.toml"
    base.write_text(base.read_text().replace(*change))
    assert command(["law", "sweep", str(tmp_path / "sweep/grid.toml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)
    assert not grid.records.parent.exists()


def test_a_command_that_is_not_there_is_said_once(
    make: Callable[..., Grid], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(more='command = ["no-such-command"]')
    assert command(["law", "sweep", str(tmp_path / "sweep/grid.toml")]) == 2
    said = capsys.readouterr().err
    assert said.count("no-such-command cannot be started") == 1
    assert "is missing" not in said


def test_held_out_text_of_another_vocabulary_is_refused_at_once(
    make: Callable[..., Grid], corpus: Path, tmp_path: Path
) -> None:
    make()
    other = Grammar(GrammarConfig(levels=2, symbols=5, rules=2, words=4))
    write_grammar(other, tmp_path / "other", "held-out", 1, 2000)
    base = tmp_path / "sweep/base.toml"
    base.write_text(base.read_text().replace(str(corpus / "held-out"), str(tmp_path / "other")))
    pretending = Pretending()
    with pytest.raises(ConfigError, match=r"another vocabulary than .*; tokenise both with one"):
        sweep(read_grid(tmp_path / "sweep/grid.toml"), [pretending], quiet)
    assert not pretending.trained


def test_losses_on_different_texts_are_not_compared(make: Callable[..., Grid]) -> None:
    grid = make()
    sweep(grid, [Pretending()], quiet, only="320")
    path = grid.records / "wide-x4-320-s0.json"
    path.write_text(path.read_text().replace('"evaluated_tokens": 9', '"evaluated_tokens": 8'))
    with pytest.raises(ConfigError, match="small-x1-320-s0 and wide-x4-320-s0 were evaluated on"):
        read_records(grid.records)


SCRIPT = """
import json, pathlib, sys
base, option, *overrides = sys.argv[1:]
assert base.endswith("base.toml") and option == "--set", sys.argv
if "wide" in str(overrides):
    sys.exit(3)
fields = dict(override.split("=", 1) for override in overrides)
folder, steps = pathlib.Path(json.loads(fields["run.folder"])), int(fields["schedule.steps"])
(folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
last = {"step": steps, "tokens": 9, "held_out_loss": 3.0, "evaluated_tokens": 9}
(folder / "metrics.jsonl").write_text(json.dumps(last))
"""


def test_runs_may_be_commands(
    make: Callable[..., Grid], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    words = json.dumps([sys.executable, str(tmp_path / "train.py")])
    make(more=f"command = {words}")
    grid = str(tmp_path / "sweep/grid.toml")
    assert command(["law", "sweep", grid, "--only", "x1-320"]) == 0
    assert command(["law", "sweep", grid, "--only", "wide"]) == 1
    said = capsys.readouterr().err
    assert "wide-x4-320-s0 is missing: its command ended with 3" in said
    assert "1 of 5 runs" in said
    assert command(["law", "sweep", grid, "--only", "nothing"]) == 2
    assert "--only nothing: no run's name holds that" in capsys.readouterr().err
    (tmp_path / "sweep/runs/records").rename(tmp_path / "kept")
    (tmp_path / "sweep/runs/records").touch()
    assert command(["law", "sweep", grid, "--only", "small-x4-320"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "sweep/runs/records").unlink()
    (tmp_path / "kept").rename(tmp_path / "sweep/runs/records")
    assert command(["law", "sweep", grid, "--list"]) == 0
    said = capsys.readouterr().out
    assert "done     small-x1-320-s0\nmissing  small-x1-640-s0" in said


def test_a_shared_stable_phase_gives_what_each_run_gives_by_itself(
    make: Callable[..., Grid], tmp_path: Path
) -> None:
    """Trained for real: sigmoid routers with biases, so that all that a checkpoint holds counts."""
    sparse = 'sparse = { "router.score" = "sigmoid", "model.shared_experts" = 1 }'
    only = GRID[: GRID.index('[[model]]\nname = "wide"')].replace("ratios = [1, 4]", "ratios = [4]")
    make("shared", sparse, only)
    make("alone", sparse, only.replace("[640, 320]", "[640]"))
    for folder in ("shared", "alone"):
        assert command(["law", "sweep", str(tmp_path / folder / "grid.toml")]) == 0
    [alone] = read_records(tmp_path / "alone/runs/records")
    shared = read_records(tmp_path / "shared/runs/records")[1]
    assert (shared.name, shared.tokens) == (alone.name, alone.tokens)
    assert shared.loss == alone.loss


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('"optimizer.rate"', '"optimizer.pace"'), "pace"),
        (("ratios = [1, 4]", "ratios = [0]"), "ratio 0"),
        (('name = "wide"', 'name = "small"'), "a name of its own"),
        (('name = "wide"', 'name = "a/b"'), "'a/b' cannot be a file's"),
        (("ratios = [1, 4]", "ratios = [1, 4, 4]"), r"ratios = \[1, 4, 4\]: .* none of them twice"),
        (("ratios = [4]", "ratios = []"), r"ratios = \[\]: give at least one"),
        (("tokens = [640, 320]", "seeds = [0, 0]\ntokens = [640]"), r"seeds = \[0, 0\]"),
        (("tokens = [640, 320]", "tokens = []"), r"tokens = \[\]"),
        (("tokens = [640, 320]", "tokens = [640, 650]"), "x1-650-s0 and .* as many steps"),
        (("tokens = [640, 320]", "tokens = [640, 64]"), "schedule.warmup = 2"),
        (("[[model]]", "more = 1\n[[model]]"), "unknown field `more`"),
        (('"router.z_loss"', '"run.folder" = "x", "router.z_loss"'), r"run\.folder = 'x': the sw"),
        (("[[model]]", "dense = {{ 'model.experts' = 4 }}\n[[model]]"), r"model\.experts = 4: the"),
        (("[640, 320]", "[640"), "cannot be read as a grid"),
        (('"router.z_loss"', '"data.rows" = 4, "router.z_loss"'), r"1 \* 4 rows, .* 1 \* 2"),
        (('"router.z_loss"', '"data.length" = 8, "router.z_loss"'), r"data\.length of wide"),
        (
            (
                "1e-3 }}",
                '1e-3, "router.score" = "sigmoid", "router.bias_frozen" = 0.3,'
                ' "model.shared_experts" = 1 }}',
            ),
            r"router\.bias_frozen = 0\.3",
        ),
    ],
)
def test_grids_that_cannot_be_are_refused(
    make: Callable[..., Grid], change: tuple[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make(grid=GRID.replace(*change, 1))


def test_a_grid_without_held_out_text_is_refused_before_it_is_trained(
    make: Callable[..., Grid], tmp_path: Path
) -> None:
    make()
    base = tmp_path / "sweep/base.toml"
    base.write_text("".join(x for x in BASE.splitlines(True) if not x.startswith("held_out")))
    with pytest.raises(ConfigError, match=r"base\.toml: .*set data\.held_out"):
        read_grid(tmp_path / "sweep/grid.toml")

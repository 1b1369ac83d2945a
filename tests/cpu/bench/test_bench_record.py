"""Records: what is written can be read again, and nothing that is not a record can."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from fourfold.bench import record as record_module
from fourfold.bench.kernels.config import KernelsBenchConfig
from fourfold.bench.offline.config import OfflineBenchConfig
from fourfold.bench.offline.main import main as offline
from fourfold.bench.quality.config import QualityBenchConfig
from fourfold.bench.quality.layers import main as layers
from fourfold.bench.quality.layers_config import LayersBenchConfig
from fourfold.bench.quality.main import main as quality
from fourfold.bench.record import (
    Hardware,
    Record,
    Result,
    check_out,
    load,
    new_record,
    software_versions,
    source_commit,
    this_hardware,
    with_peer,
    write,
)
from fourfold.bench.roles.config import RolesBenchConfig
from fourfold.bench.roles.main import main as roles
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.main import main as serve
from fourfold.bench.tiles.config import TilesBenchConfig
from fourfold.bench.train.config import TrainBenchConfig
from fourfold.bench.train.main import main as train
from fourfold.bench.transport.config import TransportBenchConfig
from fourfold.bench.transport.main import main as transport
from fourfold.errors import ConfigError

PLAIN: dict[str, Any] = {
    "name": "decode",
    "command": "fourfold bench decode",
    "date": "2026-11-23T12:00:00Z",
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0},
    "software": {"python": "3.12.1"},
    "results": [{"case": "batch 1", "metric": "tpot", "value": 0.0048, "unit": "s"}],
}

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=20)


def optional_pair(name: str, figure: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.just({}) | st.fixed_dictionaries({name: names, figure: finite})


results = st.lists(
    st.builds(
        lambda limit, peer, **rest: Result(**rest, **limit, **peer),
        limit=optional_pair("limit_name", "limit"),
        peer=optional_pair("peer", "peer_value"),
        case=names,
        metric=names,
        value=finite,
        unit=names,
    ),
    unique_by=lambda result: (result.case, result.metric, result.peer),
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(results=results, gpus=st.lists(names, max_size=2))
def test_round_trip(
    results: list[Result], gpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("records") / "nested" / "record.json"
    record = Record(
        name="decode",
        command="fourfold bench decode",
        date=datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
        hardware=Hardware(cpu="a CPU", cores=2, memory_gib=8.0, gpus=tuple(gpus)),
        software={"python": "3.12.1"},
        results=tuple(results),
    )
    write(record, path)
    assert load(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_absent_fields_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(PLAIN))
    write(load(path), path)
    assert json.loads(path.read_text()) == PLAIN


@pytest.mark.parametrize(
    "change",
    [
        {"commit": None},
        {"gpu": "unknown field"},
        {"date": "2026-11-23T12:00:00"},
        {"software": {"python": 3}},
        {"results": [{"case": "a", "metric": "b", "value": None, "unit": "s"}]},
        {"results": [{"case": "a", "metric": "b", "value": "1", "unit": "s"}]},
        {"results": [{"case": "a", "metric": "b", "value": 1.0}]},
        {"results": [{"case": "a", "metric": "b", "value": 1.0, "unit": "s", "limit": 2.0}]},
        {"results": [{"case": "a", "metric": "b", "value": 1.0, "unit": "s", "peer": "vLLM"}]},
        {"results": [{"case": "a", "metric": "b", "value": 1.0, "unit": "s"}] * 2},
    ],
)
def test_load_is_strict(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(PLAIN | change))
    with pytest.raises(ConfigError, match=r"record\.json is not a benchmark record"):
        load(path)


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        load(tmp_path / "absent.json")


def test_a_record_replaces_only_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    check_out(path, "decode")
    check_out(tmp_path / "new" / "record.json", "decode")
    path.write_text(json.dumps(PLAIN))
    check_out(path, "decode")
    with pytest.raises(ConfigError, match=r"holds the record 'decode', which 'serve' would"):
        check_out(path, "serve")
    path.write_text("# Notes")
    with pytest.raises(ConfigError, match="not a benchmark record; give another file"):
        check_out(path, "decode")
    for unfit in (tmp_path, path / "record.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_out(unfit, "decode")


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (offline, OfflineBenchConfig),
        (quality, QualityBenchConfig),
        (layers, LayersBenchConfig),
        (roles, RolesBenchConfig),
        (serve, ServeBenchConfig),
        (transport, TransportBenchConfig),
        (train, lambda **out: TrainBenchConfig(config=Path("nowhere.toml"), **out)),
    ],
)
def test_every_benchmark_looks_where_its_record_goes_first(
    main: Callable[[Any], int], config: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(PLAIN))
    with pytest.raises(ConfigError, match="holds the record 'decode'"):
        main(config(out=path))
    assert json.loads(path.read_text()) == PLAIN


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (KernelsBenchConfig, {"only": ("pages", "pages")}),
        (OfflineBenchConfig, {"cases": ("decode-1x5", "decode-1x5")}),
        (OfflineBenchConfig, {"peers": ("transformers", "transformers")}),
        (TilesBenchConfig, {"products": ("experts-first", "experts-first")}),
        (TilesBenchConfig, {"tokens": (8, 1, 8)}),
        (TransportBenchConfig, {"paths": ("tcp", "tcp")}),
        (TransportBenchConfig, {"run_pages": (1, 1)}),
        (TrainBenchConfig, {"config": Path("run.toml"), "forms": ("dense", "dense")}),
        (TrainBenchConfig, {"config": Path("run.toml"), "peers": ("plain", "plain")}),
    ],
)
def test_what_would_be_recorded_twice_is_refused(
    config: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"^--[a-z-]+ names \S+ twice; name it once$"):
        config(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["value", "limit", "peer_value"])
def test_figures_are_finite(field: str, value: float) -> None:
    fields: dict[str, Any] = {"case": "a", "metric": "b", "value": 1.0, "unit": "s"}
    fields |= {"limit": 1.0, "limit_name": "l", "peer": "p", "peer_value": 1.0, field: value}
    with pytest.raises(ValueError, match="not finite"):
        Result(**fields)


def test_a_record_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(PLAIN))
    good = load(path)
    bad = msgspec.structs.replace(good, name=3)
    with pytest.raises(msgspec.ValidationError):
        write(bad, path)
    assert load(path) == good


def test_new_record_describes_this_machine() -> None:
    record = new_record("a", "b", [], packages=("pytest", "no-such-package"))
    assert record.date.tzinfo is datetime.UTC
    assert record.hardware == this_hardware()
    assert record.hardware.cores >= 1
    assert record.hardware.memory_gib > 0
    assert record.software == software_versions(("pytest",))
    assert set(record.software) - {"cuda"} == {"python", "pytest"}


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_software_names_the_cuda_of_torch(
    cuda: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert software_versions(()).get("cuda") == cuda


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent outside a repository and where the repository does not hold us; dirty when edited,
    but not by a new record."""
    source = tmp_path / "src" / "record.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(record_module, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert source_commit() is UNSET
    git("init", "-q")
    assert source_commit() is UNSET
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert source_commit() == head
    kept = tmp_path / "benchmarks" / "results" / "a.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    assert source_commit() == head
    source.write_text("edited")
    assert source_commit() == f"{head}-dirty"


@pytest.mark.parametrize(
    ("began", "ended", "recorded"),
    [
        ("a1", "a1", "a1"),
        ("a1", "b2", "a1-dirty"),
        ("a1", "a1-dirty", "a1-dirty"),
        ("a1-dirty", "b2", "a1-dirty"),
        (UNSET, UNSET, UNSET),
    ],
)
def test_the_commit_is_that_of_the_runs_start(
    began: Any, ended: Any, recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_module._commit_at_start.cache_clear()
    monkeypatch.setattr(record_module, "source_commit", lambda: began)
    check_out(tmp_path / "record.json", "a")
    monkeypatch.setattr(record_module, "source_commit", lambda: ended)
    assert new_record("a", "b", []).commit == recorded
    record_module._commit_at_start.cache_clear()


def test_with_peer_joins_equal_cases() -> None:
    def result(case: str, value: float, unit: str = "s") -> Result:
        return Result(case=case, metric="tpot", value=value, unit=unit)

    theirs = new_record("serve", "vllm bench", [result("a", 2.0), result("b", 3.0, "ms")])
    joined = with_peer([result("a", 1.0), result("b", 1.0)], "vLLM", theirs)
    assert (joined[0].peer, joined[0].peer_value) == ("vLLM", 2.0)
    assert joined[1] == result("b", 1.0)  # another unit is another figure
    with pytest.raises(ConfigError, match="vLLM shares no figure"):
        with_peer([result("c", 1.0)], "vLLM", theirs)

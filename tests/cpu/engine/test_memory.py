"""KV pages get memory that is there, and no more."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.engine import memory
from fourfold.engine.config import EngineConfig
from fourfold.engine.memory import allocate_pages, available_memory
from fourfold.errors import ConfigError
from fourfold.models.decoder import Decoder
from fourfold.models.loading import pages_of
from fourfold.models.precision import PageFormat
from fourfold.quadrants.kv_pages import KVPages
from tests.cpu.driving import load_tiny

GIB = 2**30


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe"))


def allocate(model: Decoder, config: EngineConfig) -> tuple[KVPages, int]:
    config = config.on("cpu")
    return allocate_pages(model, config, pages_of(model, PageFormat.FLOAT), shared=False)


def gib_of(model: Decoder, count: int) -> float:
    return count * pages_of(model, PageFormat.FLOAT).page_bytes / GIB


def has(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: gib * GIB)


def test_more_than_is_available_is_refused(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 1.5)
    with pytest.raises(ConfigError, match=r"--kv-memory-gib 400 exceeds the 1\.50 GiB .*lower it"):
        allocate(model, EngineConfig(kv_memory_gib=400))
    assert allocate(model, EngineConfig(kv_memory_gib=1.5))[1] == 1.5 // gib_of(model, 1)


def test_the_default_takes_what_fits_and_says_so(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    has(monkeypatch, 3)
    assert allocate(model, EngineConfig())[1] == 2 // gib_of(model, 1)
    assert not caplog.messages
    has(monkeypatch, 1)
    assert allocate(model, EngineConfig())[1] == 0.75 // gib_of(model, 1)
    assert "0.75 GiB instead of 2, since 1.00 GiB" in caplog.text


def test_too_few_pages_name_what_helps(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, gib_of(model, 2))
    with pytest.raises(ConfigError, match=r"1 KV pages .*are available; free some"):
        allocate(model, EngineConfig())
    with pytest.raises(ConfigError, match=r"1 KV pages .*raise --kv-memory-gib"):
        allocate(model, EngineConfig(kv_memory_gib=gib_of(model, 1)))


@pytest.mark.parametrize(
    ("asked", "remedy"), [(None, "lower --step-tokens or --max-running"), (0.001, "raise --kv-me")]
)
def test_a_gpu_with_nothing_left_is_not_to_be_given_more(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, remedy: str
) -> None:
    monkeypatch.setattr(memory, "_free", lambda device: GIB)
    config = EngineConfig(kv_memory_gib=asked)
    _, told = memory._page_memory(config, torch.device("cuda:0"), workspace=GIB)
    assert told.startswith(remedy)


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A machine with 8 GiB available, and what it tells of control groups."""
    meminfo = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n"
    for name, text in {"meminfo": meminfo, "self/cgroup": groups}.items():
        path = root / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(limit: int | str, used: int, cached: int, *, old: bool = False) -> dict[str, str]:
    """Files of a control group, of version 1 if `old`."""
    names = ("memory.max", "memory.current", "")
    if old:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    stat = f"anon 5\n{names[2]}active_file {cached}\n{names[2]}inactive_file 7\n"
    return {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": stat}


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


HYBRID = "4:cpu,memory:/box\n3:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/a/b\n", below("a/b", group("max", 1, 1)), 8 * GIB),
        ("0::/a/b\n", below("a/b", group(4 * GIB, 3 * GIB, GIB)), 2 * GIB + 7),
        (
            "0::/a/b\n",
            below("a", group(GIB, 5, 0)) | below("a/b", group("max", 5, 0)),
            GIB - 5 + 7,
        ),
        ("0::/\n", group(GIB, 2 * GIB, 0), 0),
        (HYBRID, below("memory/box", group(2 * GIB, GIB, 0, old=True)), GIB + 7),
        (HYBRID, below("memory", group(3 * GIB, GIB, 0, old=True)), 2 * GIB + 7),
        (HYBRID, below("memory/box", group(2**63 - 4096, GIB, 0, old=True)), 8 * GIB),
    ],
)
def test_what_is_available(
    tmp_path: Path, groups: str, files: dict[str, str], available: int
) -> None:
    assert available_memory(system(tmp_path, groups, files)) == available


def test_a_system_that_does_not_tell(
    tmp_path: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available_memory(tmp_path) == math.inf
    has(monkeypatch, math.inf)
    assert allocate(model, EngineConfig())[1] == 2 // gib_of(model, 1)

"""What a start tells about itself: where memory is, and how long its parts took."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.models import phases
from fourfold.models.checkpoint.source import find_source
from fourfold.models.footprint import EXPERTS, footprint
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.memory import told, weight_bytes
from fourfold.models.precision import Precision
from tests.cpu.instead import Instead

Find = Callable[[str], Path]
GIB = 1 << 30


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "mixtral"])
def test_weights_are_told_by_part(family: str, checkpoint: Find) -> None:
    source = find_source(str(checkpoint(family)))
    model = load_model(source, LoadOptions(precision=Precision.FLOAT32))
    held = weight_bytes(model)
    parts = {part.name.split(",")[0]: 4 * part.total for part in footprint(model.config)}
    frequencies = held.pop("", 0)
    assert frequencies == model.frequencies.nbytes
    assert {part: held[part] for part in held if held[part]} == parts


@pytest.mark.parametrize("exact", [False, True])
def test_codes_are_told_too(exact: bool, checkpoint: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no parameters of a module, and packed for oneDNN where a CPU has VNNI: whatever
    this one has."""
    monkeypatch.setattr("fourfold.kernels.cpu_w8a8_gemm.exact_on_cpu", lambda: exact)
    source = find_source(str(checkpoint("qwen3-moe")))
    model = load_model(source, LoadOptions(precision=Precision.W8A8))
    [experts] = [part.total for part in footprint(model.config) if part.name == EXPERTS]
    assert weight_bytes(model)[EXPERTS] >= experts


def test_weights_are_one_line() -> None:
    held = {"head": GIB, EXPERTS: 15 * GIB, "norms": 100}
    assert told(held) == f"16.0 GiB ({EXPERTS} 15.0, head 1.0)"


def test_weights_of_a_small_model_are_told_in_smaller_units() -> None:
    mib = 1 << 20
    held = {"head": mib, EXPERTS: 200 * mib, "norms": mib // 40}
    assert told(held) == f"201.0 MiB ({EXPERTS} 200.0, head 1.0)"
    assert told({"norms": 100}) == "0.0 MiB"


def test_parts_of_a_start_are_told_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0)
    monkeypatch.setattr(phases, "time", Instead(time, monotonic=lambda: next(clock)))
    start = phases.Phases(started=95.0)
    with start("weights"):
        pass
    with start("kernels"), start("weights"):
        pass
    assert start.seconds == {"weights": 2.0, "kernels": 3.0}
    assert start.ready() == "ready after 11.0 s (weights 2.0, kernels 3.0, other 6.0)"

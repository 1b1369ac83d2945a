"""`fourfold bench transport` sends what it says by both paths, and keeps the figures."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from msgspec import UNSET

from fourfold.bench.record import load
from fourfold.bench.transport import main as bench
from fourfold.bench.transport.config import TransportBenchConfig
from fourfold.bench.transport.main import main
from fourfold.bench.transport.near import _give_all
from fourfold.errors import ConfigError
from fourfold.transport import nixl
from tests.cpu.transport.nodes import needs_nixl


def test_a_small_run_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transport.json"
    assert main(TransportBenchConfig(size=4, page_bytes=10_000, streams=2, rounds=1, out=out)) == 0
    record = load(out)
    assert (
        record.command
        == "fourfold bench transport --size 4 --page-bytes 10000 --streams 2 --rounds 1"
    )
    cases = {result.case.partition(",")[0] for result in record.results}
    assert cases == {"tcp x2", "shared memory"}
    rates = [result for result in record.results if result.metric == "rate"]
    assert all(isinstance(rate.peer_value, float) for rate in rates)
    assert [rate.unit for rate in rates] == ["GB/s"] * 4
    assert [rate.case.endswith("scattered") for rate in rates] == [False, False, True, True]
    assert "round_trip_p50" in capsys.readouterr().out


@needs_nixl
def test_rdma_is_measured_beside_copies_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,cma")
    out = tmp_path / "transport.json"
    config = TransportBenchConfig(
        size=4, page_bytes=10_000, streams=2, rounds=1, run_pages=(32,), paths=("rdma",), out=out
    )
    assert main(config) == 0
    results = load(out).results
    assert all(result.case.startswith("rdma (ucx, UCX_TLS=tcp,cma), ") for result in results)
    (rate,) = [result for result in results if result.metric == "rate"]
    assert rate.peer is not None
    assert "memcpy" in rate.peer
    assert rate.mark is UNSET


def test_rdma_that_cannot_be_had_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "FarProcess", lambda: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=r"pip install 'fourfold\[rdma\]'"):
        main(TransportBenchConfig(paths=("tcp", "rdma")))


def test_a_far_side_that_cannot_use_a_path_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for itself: what this side finds is no matter there."""
    monkeypatch.setattr(nixl, "check", lambda host: None)
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    with pytest.raises(ConfigError, match=r"rdma cannot be measured: .*NIXL"):
        main(TransportBenchConfig(size=4, page_bytes=10_000, rounds=1, paths=("rdma",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "--size"),
        ({"rounds": 0}, "--rounds"),
        ({"streams": 99}, "--streams"),
        ({"paths": ()}, "--paths"),
        ({"run_pages": (0,)}, "--run-pages"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransportBenchConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 1 << 24])
def test_a_thread_that_sends_says_nothing_of_a_far_process_that_has_ended(size: int) -> None:
    """Whoever waits for that process's answer says it."""
    near, far = socket.socketpair()
    far.close()
    _give_all(near, memoryview(bytes(size)), 1 << 20)
    assert near.fileno() == -1

"""`fourfold bench transport --paths device`: two processes and one GPU."""

from __future__ import annotations

from pathlib import Path

from fourfold.bench.record import load
from fourfold.bench.transport.config import TransportBenchConfig
from fourfold.bench.transport.main import main


def test_pages_are_pulled_from_one_process_to_another(tmp_path: Path) -> None:
    out = tmp_path / "transport.json"
    config = TransportBenchConfig(size=64, rounds=2, paths=("device",), out=out)
    assert main(config) == 0
    cases = {result.case for result in load(out).results}
    assert cases == {
        "device memory, 64 MiB in pages of 64 KiB in runs of 32",
        "device memory, 64 MiB in pages of 64 KiB scattered",
    }

"""`fourfold bench offline`: measure the engine alone, beside other engines."""

from __future__ import annotations

from fourfold.bench.offline.config import OfflineBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.offline.main import main

    return main(options)

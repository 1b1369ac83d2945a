"""`fourfold bench transport`: pages between processes beside plain copies of as many bytes."""

from __future__ import annotations

from fourfold.bench.transport.config import TransportBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.transport.main import main

    return main(options)

"""`fourfold bench kernels`: every kernel against the hardware's limit and the best library."""

from __future__ import annotations

from fourfold.bench.kernels.config import KernelsBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.kernels.main import main

    return main(options)

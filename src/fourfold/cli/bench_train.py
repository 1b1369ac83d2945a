"""`fourfold bench train`: training steps beside plain PyTorch's and torchtitan's."""

from __future__ import annotations

from fourfold.bench.train.config import TrainBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.train.main import main

    return main(options)

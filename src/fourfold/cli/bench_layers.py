"""`fourfold bench layers`: what each layer of a quantised model is off by."""

from __future__ import annotations

from fourfold.bench.quality.layers_config import LayersBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.quality.layers import main

    return main(options)

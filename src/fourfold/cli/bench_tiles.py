"""`fourfold bench tiles`: the chosen tiles of the products beside all others."""

from __future__ import annotations

from fourfold.bench.tiles.config import TilesBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.tiles.main import main

    return main(options)

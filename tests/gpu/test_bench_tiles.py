"""All tiles that `fourfold bench tiles` tries compile, fit and give one result."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.bench.record import load
from fourfold.bench.tiles.config import Product, TilesBenchConfig
from fourfold.bench.tiles.main import main

PRODUCTS: tuple[Product, ...] = ("projections-8", "projections-4", "experts-first")


@pytest.mark.parametrize("product", PRODUCTS)
def test_tiles_agree(product: Product, tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    assert main(TilesBenchConfig(products=(product,), tokens=(5, 100), out=out)) == 0
    assert all(0 < each.value < 1e-2 for each in load(out).results)

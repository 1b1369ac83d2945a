"""The bench of tiles: which are tried, that they must agree, and what it says of the choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.bench.kernels.timing import Timing
from fourfold.bench.tiles.candidates import candidates
from fourfold.bench.tiles.config import TilesBenchConfig
from fourfold.bench.tiles.main import compare, describe, disagreeing, main
from fourfold.bench.tiles.products import Work, works
from fourfold.errors import ConfigError
from fourfold.kernels.w4a8_gemm.choose import Kernel, Tiles
from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe

SLOW, QUICK, WRONG = Tiles(64, 16, 4, 4, 8), Tiles(64, 32, 4, 4, 8), Tiles(128, 16, 4, 4, 8)


class FakeTimer:
    """A call takes as many seconds as its result begins with."""

    def __call__(self, calls: Sequence[Callable[[], Any]], *, graph: bool) -> list[Timing]:
        assert graph
        return [Timing(seconds=float(call()[0]), spread=0.01) for call in calls]


def a_work() -> Work:
    results = {SLOW: [3e-6, 2.0], QUICK: [2e-6, 2.0], WRONG: [1e-6, -2.0]}

    def run(tiles: Tiles) -> Tensor:
        return torch.tensor(results[tiles])

    return Work("a product", SLOW, (QUICK, WRONG), run)


@pytest.mark.parametrize("tokens", [1, 8, 50, 256, 4096])
@pytest.mark.parametrize("bits", [4, 8])
def test_candidates_differ_and_suit_the_rows(tokens: int, bits: int) -> None:
    found = candidates(tokens, 16, bits=bits, grouped=False, second=False, hopper=True)
    assert len(set(found)) == len(found) > 10
    assert all(each.tokens < 2 * max(tokens, 16) for each in found)
    assert all(16 % each.split == 0 for each in found)
    assert any(each.kernel is Kernel.RING for each in found)
    without = candidates(tokens, 16, bits=bits, grouped=True, second=True, hopper=False)
    assert without
    assert all(each.kernel is Kernel.TRITON and each.split == 1 for each in without)


def test_nothing_is_split_that_does_not_divide() -> None:
    found = candidates(8, 15, bits=8, grouped=False, second=False, hopper=True)
    assert all(each.split == 1 for each in found)


def test_tiles_of_the_dense_kernel() -> None:
    def dense(tokens: int, **options: Any) -> set[tuple[int, int]]:
        options = {"bits": 8, "grouped": False, "second": False, "hopper": True} | options
        found = candidates(tokens, 16, **options)
        return {(2 * each.half, each.tokens) for each in found if each.kernel is Kernel.DENSE}

    assert dense(17) == dense(48) == {(64, 64), (128, 64)}
    assert dense(512) == dense(48) | {(128, 128), (256, 128)}
    for none in (
        dense(16),
        dense(2048),
        dense(64, bits=4),
        dense(64, grouped=True),
        dense(64, hopper=False),
    ):
        assert not none


def test_tiles_of_the_kernel_for_few_tokens() -> None:
    def few(tokens: int, **options: Any) -> list[tuple[int, int]]:
        options = {"bits": 8, "grouped": False, "second": False, "hopper": True} | options
        found = candidates(tokens, 16, **options)
        return [(2 * each.half, each.tokens) for each in found if each.kernel is Kernel.FEW]

    second: dict[str, Any] = {"bits": 4, "grouped": True, "second": True}
    assert few(1) == [(16, 8)]
    assert few(9) == [(16, 16)]
    assert few(0, **second) == few(16, **second) == [(32, 16)]
    for none in (
        few(17),
        few(17, **second),
        few(1, bits=4),
        few(1, bits=4, grouped=True),
        few(1, hopper=False),
    ):
        assert not none


@pytest.mark.parametrize(
    ("product", "recipe"),
    [
        ("projections-8", W4A8Recipe.INT8_G64),
        ("projections-4", W4A8Recipe.INT8_G64),
        ("projections-4", W4A8Recipe.FP8_CHANNEL),
    ],
)
def test_a_product_is_tried_with_every_tile_but_the_chosen_once(
    product: Any, recipe: W4A8Recipe
) -> None:
    found = list(works(product, (2, 300), recipe, torch.device("cpu"), hopper=True))
    assert [work.name.split(", ")[-1] for work in found] == [
        "2 x 5120 x 2048",
        "300 x 5120 x 2048",
        "2 x 2048 x 4096",
        "300 x 2048 x 4096",
    ]
    assert all(work.chosen not in work.candidates for work in found)


def test_tiles_that_disagree_are_named_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    work = a_work()
    assert disagreeing(work) == [WRONG]
    figure = compare(work, FakeTimer(), leave_out=[WRONG])
    assert figure.value == pytest.approx(3e-6)
    assert figure.limit == pytest.approx(2e-6)
    assert figure.limit_name == f"the best tiles: {describe(QUICK)}"
    assert "1.50 times the best of 2" in capsys.readouterr().out


def test_a_result_that_is_no_number_disagrees() -> None:
    work = a_work()
    broken = dataclasses.replace(
        work, run=lambda tiles: work.run(tiles) * (torch.nan if tiles == QUICK else 1)
    )
    assert disagreeing(broken) == [QUICK, WRONG]


def test_tiles_in_words() -> None:
    assert describe(SLOW) == "Triton 128 x 16, 4 stages, 4 warps, 8 programs"
    gluon = Tiles(64, 32, 8, 4, 2, split=2, kernel=Kernel.RING, unroll=2)
    assert describe(gluon) == "Gluon 128 x 32, 8 stages, 4 warps, 2 programs, K split 2, unrolled 2"
    dense = Tiles(64, 128, 6, 8, 1, kernel=Kernel.DENSE)
    assert describe(dense) == "dense Gluon 128 x 128, 6 stages, 8 warps, 1 programs"
    few = Tiles(16, 8, 1, 8, 1, split=8, kernel=Kernel.FEW)
    assert describe(few) == "Gluon for few tokens 32 x 8, 8 warps, K split 8"


@pytest.mark.parametrize("wrong", [{"tokens": (0,)}, {"tokens": ()}, {"products": ()}])
def test_what_cannot_be_timed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TilesBenchConfig(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="on a GPU"):
        main(TilesBenchConfig())

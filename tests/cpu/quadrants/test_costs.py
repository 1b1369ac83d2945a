"""What work is described as, what a model makes of it, and which calibration a GPU gets."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import ConfigError
from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.quadrants import costs as module
from fourfold.quadrants.costs import (
    PARTS,
    ExpertsShape,
    QuadrantCosts,
    Roofline,
    Work,
    calibration_path,
    ffn_work,
    file_name,
    find_costs,
    load_costs,
    prefill_attention_work,
    projection_work,
    scaled,
    shipped_costs,
    to_json,
    touched_experts,
    weight_bits,
)

H100 = "NVIDIA H100 80GB HBM3"
H200 = "NVIDIA H200"
ATTENTION = {"heads": 32, "kv_heads": 4, "head_width": 128}
EXPERTS = ExpertsShape(width=2048, hidden=768, experts=128, chosen=8, weight_bits=4.125)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def h100() -> QuadrantCosts:
    return next(costs for costs in shipped_costs() if costs.hardware == H100)


def test_a_chunk_reads_its_prefix_once_and_looks_at_all_before_it() -> None:
    work = prefill_attention_work([(128, 256), (64, 0)], **ATTENTION)
    pairs = 128 * 256 + 128 * 129 / 2 + 64 * 65 / 2
    assert work.operations == 4 * 32 * 128 * pairs
    # Every row looks at all of its own page.
    whole = 64 * (256 + 64) + 64 * (256 + 128) + 64 * 64
    assert work.padded == 4 * 32 * 128 * whole
    assert work.exponentials == 32 * whole
    # Five pages before the last row's own of the first chunk; q and out, k and v of 192 tokens.
    assert work.bytes == 5 * 2 * 4 * (64 * 128 + 4) + 192 * 2 * (2 * 32 + 2 * 4) * 128
    # 16 tokens of 8 heads are a tile.
    assert work.tiles == (8 + 4) * 4
    assert work.longest == (256 + 128) * 128


def test_a_page_that_is_not_full_is_looked_at_by_the_rows_it_has() -> None:
    work = prefill_attention_work([(70, 0)], **ATTENTION)
    assert work.padded == 4 * 32 * 128 * (64 * 64 + 6 * 128)
    assert work.tiles == 5 * 4


def test_heads_of_a_kv_head_are_padded_to_a_power_of_two() -> None:
    three = prefill_attention_work([(64, 0)], heads=12, kv_heads=4, head_width=64)
    four = prefill_attention_work([(64, 0)], heads=16, kv_heads=4, head_width=64)
    assert (three.padded, three.tiles) == (four.padded, four.tiles)
    assert three.operations == pytest.approx(four.operations * 3 / 4)


def test_one_token_touches_its_own_experts_and_many_touch_all() -> None:
    assert touched_experts(1, 128, 8) == pytest.approx(8)
    assert touched_experts(2, 128, 8) == pytest.approx(15.5)
    assert touched_experts(1000, 128, 8) == pytest.approx(128)


def test_the_bytes_of_an_ffn_are_those_of_the_experts_touched() -> None:
    one = ffn_work(1, EXPERTS)
    assert one.operations == 2 * 8 * 3 * 2048 * 768
    assert one.bytes == pytest.approx(8 * 3 * 2048 * 768 * 4.125 / 8 + 3 * 2048)
    assert one.longest == 2048 + 768
    assert one.padded == pytest.approx(one.operations * 16)  # a tile of 16 rows for each
    many = ffn_work(16384, EXPERTS)
    assert many.bytes == pytest.approx(128 * 3 * 2048 * 768 * 4.125 / 8 + 3 * 2048 * 16384)
    # 1024 rows an expert in tiles of 128, and half a tile.
    assert many.padded == pytest.approx(many.operations * (1 + 64 / 1024))
    assert many.tiles == (128 * 8.5) * (2 * 768 + 2048) / 128
    # SwiGLU's result and its codes are written and read, what experts return is too.
    assert many.between == 131072 * (768 * 2 * 3 + 2048 * 2 * 2)


def test_a_projection_reads_its_weight_and_pads_its_tokens() -> None:
    work = projection_work(100, inputs=2048, outputs=4096, weight_bits=4.0)
    assert work.operations == 2 * 100 * 2048 * 4096
    assert work.padded == 2 * 128 * 2048 * 4096
    assert work.bytes == 2048 * 4096 / 2 + 100 * (2048 + 2 * 4096)
    assert (work.tiles, work.longest, work.between) == (2 * 4096 / 128, 2048, 3 * 100 * 2048)


@pytest.mark.parametrize(
    ("recipe", "inputs", "bits"),
    [
        (W4A8Recipe.INT8_CHANNEL, 2048, 4 + 32 / 2048),
        (W4A8Recipe.INT8_G128, 2048, 4 + 16 / 128 + 32 / 2048),
        (W4A8Recipe.INT8_G64, 2048, 4 + 16 / 64 + 32 / 2048),
        (W4A8Recipe.FP8_G128, 2048, 4 + 8 / 128 + 32 / 2048),
        (W4A8Recipe.INT8_CHANNEL, 192, 4 * 256 / 192 + 32 / 192),
    ],
)
def test_the_bits_of_a_weight_are_those_that_are_packed(
    recipe: W4A8Recipe, inputs: int, bits: float
) -> None:
    import torch

    from fourfold.quantize.w4a8 import quantize_w4a8

    assert weight_bits(recipe, inputs) == pytest.approx(bits)
    packed = quantize_w4a8(torch.randn(8, inputs), recipe)
    assert packed.nbytes * 8 / (8 * inputs) == pytest.approx(bits)


def test_a_roofline_takes_the_dearest_bound_and_adds_the_rest() -> None:
    model = Roofline(
        fixed=1.0,
        per_byte=2.0,
        per_operation=3.0,
        per_exponential=0.5,
        per_tile=0.25,
        per_step=5.0,
        per_byte_between=7.0,
    )
    work = Work(
        bytes=10.0,
        operations=1.0,
        padded=2.0,
        exponentials=2.0,
        tiles=4.0,
        longest=1.0,
        between=1.0,
    )
    assert model.seconds(work) == 1 + 20 + 7
    assert model.seconds(dataclasses.replace(work, padded=8.0)) == 1 + (24 + 1 + 1) + 7
    assert model.seconds(dataclasses.replace(work, longest=6.0)) == 1 + 30 + 7


def test_the_users_calibration_comes_first(h100: QuadrantCosts) -> None:
    assert find_costs(H100, 3.3e12) == h100
    own = dataclasses.replace(h100, origin="measured here")
    path = calibration_path(H100)
    path.parent.mkdir(parents=True)
    path.write_bytes(to_json(own))
    assert find_costs(H100, 3.3e12) == own


def test_a_calibration_lies_in_the_cache_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert calibration_path(H200) == tmp_path / "fourfold/costs/nvidia-h200.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert calibration_path(H200) == Path("/home/somebody/.cache/fourfold/costs/nvidia-h200.json")


def test_another_gpu_is_priced_as_the_nearest_by_bandwidth(
    h100: QuadrantCosts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        slower = find_costs("NVIDIA A100-SXM4-40GB", h100.memory_bandwidth / 2, sms=108)
    assert caplog.messages == [
        "no calibration is shipped for NVIDIA A100-SXM4-40GB, so its work is priced from that of "
        f"{H100}; run `fourfold calibrate` for models of its own"
    ]
    assert slower.hardware == "NVIDIA A100-SXM4-40GB"
    assert slower.decode_ffn.per_byte == pytest.approx(2 * h100.decode_ffn.per_byte)
    assert slower.decode_ffn.per_operation == h100.decode_ffn.per_operation
    assert slower.decode_attention.page == pytest.approx(2 * h100.decode_attention.page)
    assert slower.decode_attention.sms == 108
    assert slower.limits.bandwidth == pytest.approx(h100.limits.bandwidth / 2)
    assert h100.hardware in slower.origin


def test_what_is_shipped() -> None:
    shipped = {costs.hardware: costs for costs in shipped_costs()}
    assert {H100, H200} <= shipped.keys()
    assert shipped[H100].origin.startswith("measured")
    for costs in shipped.values():
        assert (module.SHIPPED / f"{file_name(costs.hardware)}.json").exists()
        assert costs.decode_attention.hardware == costs.hardware
        assert all(costs.errors[part].points >= 3 for part in PARTS)
    h200 = shipped[H200]
    if not h200.origin.startswith("measured"):
        assert to_json(h200) == to_json(scaled(shipped[H100], H200, h200.memory_bandwidth))


@pytest.mark.parametrize(
    "damage",
    [
        {"prefill_ffn": None},
        {"errors": {}},
        {"recipe": "int3"},
        {"limits": {"bandwidth": -1.0, "operations": 1.0}},
        {"decode_ffn": {"fixed": 1.0}},
    ],
)
def test_a_damaged_calibration_is_one_sentence_with_the_remedy(
    h100: QuadrantCosts, damage: dict[str, Any]
) -> None:
    path = calibration_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(json.loads(to_json(h100)) | damage))
    with pytest.raises(ConfigError) as raised:
        find_costs(H100, 3e12)
    assert str(path) in str(raised.value)
    assert "run `fourfold calibrate` again or delete the file" in str(raised.value)
    path.write_text("{")
    with pytest.raises(ConfigError, match="fourfold calibrate"):
        load_costs(path)

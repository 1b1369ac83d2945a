"""The comparison of a quantised model with bfloat16, layer by layer: it is silent where all is well
and finds what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.bench.quality.layers import Allowed, Comparison, LayerErrors, main
from fourfold.bench.quality.layers_config import LayersBenchConfig
from fourfold.bench.quality.plain import codes_of, in_plain_float32
from fourfold.bench.quality.streams import stream_turn
from fourfold.bench.record import load
from fourfold.errors import ConfigError
from fourfold.models.conversion.simulated import Int8Codes, SimulatedWeight, values
from fourfold.models.layers import Linear
from fourfold.models.loading import read_model_config
from fourfold.models.precision import PageFormat, Precision
from fourfold.quantize.weights import W8A8Weight, to_w8a8

Find = Callable[[str], Path]


def options(path: Path, **more: object) -> LayersBenchConfig:
    sizes = {"device": "cpu", "prompts": 2, "prompt_tokens": 70, "kv_pages": PageFormat.INT8}
    return LayersBenchConfig(model=str(path), **(sizes | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", [Precision.W8A8, Precision.W4A8])
@pytest.mark.parametrize("family", ["llama-wide", "qwen3-moe-wide"])
def test_a_sound_model_is_within_its_tolerance(
    family: str,
    precision: Precision,
    checkpoint: Find,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "record.json"
    assert main(options(checkpoint(family), precision=precision, out=out)) == 0
    figures = {(r.case, r.metric): r for r in load(out).results}
    for metric in ("prefill", "decode"):
        worst = figures["worst layer of 3", metric]
        assert 0 < worst.value < worst.limit == 5.0
    worst = figures["worst layer of 3", "codes"]
    assert worst.limit == (10.0 if precision is Precision.W8A8 else 30.0)
    assert worst.value < worst.limit
    codes = figures["mean of the layers of 3", "codes"].value
    low, high = (0.1, 5.0) if precision is Precision.W8A8 else (5.0, 20.0)
    assert low < codes < high, "a rounded model is neither exact nor another"
    logits = figures["logits of prefilled tokens", "served to exact"].value
    assert codes / 2 < logits < 10 * codes
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_codes_that_cost_too_much_fail_the_run(
    checkpoint: Find, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Allowed, "of", lambda precision: Allowed(kernels=0.05, codes=0.001))
    assert main(options(checkpoint("llama-wide"), precision=Precision.W8A8)) == 1
    told = capsys.readouterr().err
    assert "worst layer of 3, codes" in told
    assert "more than the 0.1 % that are allowed" in told
    assert "prefill" not in told.split(", codes")[0]


@pytest.mark.parametrize("bad", [{"decode": float("nan")}, {"drift": float("inf")}])
def test_a_layer_without_numbers_fails_the_run(
    bad: dict[str, float],
    checkpoint: Find,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = LayerErrors(prefill=0.01, decode=0.01, codes=0.01, routing=0.0, drift=0.01)
    found = iter([fine, dataclasses.replace(fine, **bad), fine])
    monkeypatch.setattr(Comparison, "compare_layer", lambda *_: next(found))
    out = tmp_path / "record.json"
    assert main(options(checkpoint("llama-wide"), precision=Precision.W8A8, out=out)) == 1
    assert "layer 1 gave numbers that are not finite" in capsys.readouterr().err
    assert not out.exists()


def test_a_dummy_needs_only_its_configuration(checkpoint: Find, tmp_path: Path) -> None:
    config = (checkpoint("qwen3-moe-wide") / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    assert main(options(tmp_path, load="dummy", prompts=1, prompt_tokens=9)) == 0


@pytest.mark.parametrize("part", ["attention", "experts"])
def test_a_wrong_layer_is_found(
    part: str, checkpoint: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth too much in the served layer alone is seen in that layer, and nowhere before it."""
    comparison = Comparison(options(checkpoint("qwen3-moe-wide")))
    assert comparison.compare_layer(0).prefill < 0.05
    quantise = comparison._quantiser.quantise_block

    def spoil(block: object) -> None:
        quantise(block)  # type: ignore[arg-type]
        attention, ffn = block.attention, block.ffn  # type: ignore[attr-defined]
        weight = attention.output.weight if part == "attention" else ffn.experts.down
        plain = weight.product

        def louder(*arguments: object) -> Tensor:
            return plain(*arguments) * 1.3

        weight.product = louder

    monkeypatch.setattr(comparison._quantiser, "quantise_block", spoil)
    errors = comparison.compare_layer(1)
    assert errors.prefill > 0.05
    assert errors.decode > 0.05


@pytest.mark.parametrize("exact", [False, True])
def test_the_codes_of_a_packed_weight_are_found_again(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourfold.kernels.cpu_w8a8_gemm.exact_on_cpu", lambda: exact)
    weight = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1))
    packed = to_w8a8(weight)
    assert isinstance(packed, W8A8Weight)
    codes = codes_of(packed)
    assert isinstance(codes, Int8Codes)
    expected = Int8Codes.of(weight)
    assert torch.equal(codes.codes_EOI, expected.codes_EOI)
    torch.testing.assert_close(values(codes), values(expected))


def test_a_part_with_weights_packed_for_a_cpu_is_compared_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot be copied."""
    monkeypatch.setattr("fourfold.kernels.cpu_w8a8_gemm.exact_on_cpu", lambda: True)
    served = Linear(64, 40)
    served.weight = to_w8a8(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)))
    plain = in_plain_float32(served)
    assert isinstance(served.weight, W8A8Weight)
    assert isinstance(plain.weight, SimulatedWeight)


def test_the_stream_is_turned_as_embeddings_are(checkpoint: Find) -> None:
    fields = json.loads((checkpoint("llama-wide") / "config.json").read_text())
    _, config = read_model_config(fields, "config.json")
    turn = stream_turn(config, torch.device("cpu"))
    assert turn.shape == (config.width, config.width)
    torch.testing.assert_close(turn @ turn.T, torch.eye(config.width), atol=1e-5, rtol=0)
    assert float(turn.abs().max()) < 0.5


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no codes"):
        LayersBenchConfig(precision=Precision.BFLOAT16)
    with pytest.raises(ConfigError, match="--prompts"):
        LayersBenchConfig(prompts=0)

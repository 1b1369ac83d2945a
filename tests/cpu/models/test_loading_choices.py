"""What pages a model's precision goes with."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.engine import building
from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.decode_attention.plan import TILES
from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models import loading
from fourfold.models.checkpoint.fourfold_format import FourfoldFormat
from fourfold.models.config import ModelConfig, MoEConfig
from fourfold.models.footprint import EXPERTS, TIED
from fourfold.models.loading import KERNEL_MOST_SHARED, check_widths, page_shape
from fourfold.models.precision import PageFormat, Precision
from fourfold.models.quantising import RECIPES
from fourfold.models.storage import storage_of
from fourfold.quadrants.costs import weight_bits

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU, which is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def config(head_width: int = 128, shared: int = 2) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocabulary=320,
        layers=2,
        width=256,
        query_heads=2 * shared,
        kv_heads=2,
        head_width=head_width,
        ffn_width=256,
        max_positions=512,
        norm_eps=1e-6,
    )


def test_pages_are_coded_on_a_gpu_that_reads_them() -> None:
    biased = dataclasses.replace(config(), qkv_bias=True)
    for precision in (Precision.W4A8, Precision.W4A8_FP8, Precision.BFLOAT16):
        assert page_shape(config(), precision, GPU, PageFormat.AUTO).codes == "int8"
    assert page_shape(biased, Precision.W4A8, GPU, PageFormat.AUTO).codes == "int8"
    assert page_shape(biased, Precision.BFLOAT16, GPU, PageFormat.AUTO).codes is None
    assert page_shape(config(), Precision.FLOAT32, GPU, PageFormat.AUTO).codes is None
    assert page_shape(config(96), Precision.W4A8, GPU, PageFormat.AUTO).codes is None
    assert page_shape(config(shared=65), Precision.W4A8, GPU, PageFormat.AUTO).codes is None
    assert page_shape(config(), Precision.W4A8, CPU, PageFormat.AUTO).codes is None


def test_a_gpu_that_multiplies_no_int8_keeps_pages_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert page_shape(config(), Precision.BFLOAT16, GPU, PageFormat.AUTO).codes is None
    with pytest.raises(ConfigError, match="Ampere or newer GPU; use --kv-pages float"):
        page_shape(config(), Precision.BFLOAT16, GPU, PageFormat.INT8)
    assert page_shape(config(), Precision.W4A8, CPU, PageFormat.INT8).codes == "int8"


@pytest.mark.parametrize("precision", [Precision.W8A8, Precision.W4A8, Precision.FLOAT32])
def test_open_pages_are_as_precise_as_the_rows_of_a_chunk(precision: Precision) -> None:
    """Whatever the CPU multiplies natively: else cutting a prompt could change its answer."""
    assert page_shape(config(), precision, CPU, PageFormat.INT8).dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "precision", "complaint"),
    [(96, Precision.W4A8, "96 wide"), (128, Precision.FLOAT32, "16-bit activations")],
)
def test_what_the_kernels_do_not_read_is_refused(
    width: int, precision: Precision, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        page_shape(config(width), precision, GPU, PageFormat.INT8)


def test_more_query_heads_than_a_tile_has_rows_are_refused_before_anything_is_planned() -> None:
    assert TILES[-1] == KERNEL_MOST_SHARED == 64
    assert page_shape(config(shared=64), Precision.W4A8, GPU, PageFormat.INT8).codes == "int8"
    complaint = r"65 query heads per KV head \(at most 64\).*--kv-pages float"
    with pytest.raises(ConfigError, match=complaint):
        page_shape(config(shared=65), Precision.W4A8, GPU, PageFormat.INT8)
    assert page_shape(config(shared=65), Precision.W4A8, CPU, PageFormat.INT8).codes == "int8"


@pytest.mark.parametrize("precision", RECIPES)
def test_inspect_counts_the_bits_of_the_recipe(precision: Precision) -> None:
    inputs = 1 << 20  # so that a channel's own scale does not show
    bits = weight_bits(RECIPES[precision], inputs)
    storage = storage_of(precision, GPU, None)
    assert 8 * storage.bytes_held(EXPERTS) == pytest.approx(bits, abs=1e-3)


def test_inspect_counts_the_bits_that_a_checkpoint_was_packed_in() -> None:
    packed = FourfoldFormat("here", W4A8Recipe.INT8_CHANNEL, made={"attention_bits": "4"})
    kept = storage_of(Precision.W4A8, GPU, packed)
    assert kept.bytes_held(EXPERTS) == kept.bytes_held("attention") == 0.5
    assert (kept.bytes_held("head"), kept.bytes_read("head")) == (1, 1)
    assert (kept.bytes_held(TIED), kept.bytes_read(TIED)) == (3, 1)
    expanded = storage_of(Precision.W4A8, CPU, packed)
    assert expanded.bytes_held(EXPERTS) == expanded.bytes_held("attention") == 1
    floating = storage_of(Precision.BFLOAT16, GPU, packed)
    assert floating.bytes_held(TIED) == floating.bytes_read(EXPERTS) == 2


@pytest.mark.parametrize(
    ("changed", "widest"),
    [
        ({"ffn_width": 28672}, 28672),
        ({"query_heads": 256, "head_width": 128}, 32768),
        (
            {"ffn_width": 28672, "moe": MoEConfig(experts=4, experts_per_token=2, expert_width=64)},
            0,
        ),
        ({"moe": MoEConfig(experts=4, experts_per_token=2, expert_width=16512)}, 16512),
    ],
)
def test_rows_too_wide_for_the_kernels_are_refused_before_loading(
    changed: dict[str, Any], widest: int
) -> None:
    """As those of a dense model of 70 billion parameters are."""
    model = dataclasses.replace(config(), **changed)
    check_widths(model, GPU, Precision.BFLOAT16)
    check_widths(model, CPU, Precision.W4A8)
    if not widest:
        check_widths(model, GPU, Precision.W4A8)
        return
    with pytest.raises(CheckpointError, match=rf"{widest} .* --precision bfloat16"):
        check_widths(model, GPU, Precision.W4A8)


@pytest.mark.parametrize("asked", [Precision.W4A8_FP8, Precision.W4A8, Precision.W8A8])
def test_fp8_codes_where_none_can_be_multiplied_are_refused_with_a_way_out(
    asked: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error that helps, not two that name each other."""
    packed = FourfoldFormat("here", W4A8Recipe.FP8_G128)
    monkeypatch.setattr(loading, "packed_format", lambda checkpoint: packed)
    checkpoint: Any = SimpleNamespace(where="here")
    with pytest.raises(ConfigError, match="--precision bfloat16 or float32"):
        loading.served_precision(asked, CPU, checkpoint)
    assert loading.served_precision(Precision.FLOAT32, CPU, checkpoint) is Precision.FLOAT32
    assert not loading.served_precision(Precision.AUTO, CPU, checkpoint).quantised


def test_codes_are_not_quantised_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = FourfoldFormat("here", W4A8Recipe.INT8_G64)
    monkeypatch.setattr(loading, "packed_format", lambda checkpoint: packed)
    monkeypatch.setattr(loading, "exact_on_cpu", lambda: True)
    checkpoint: Any = SimpleNamespace(where="here")
    for asked in (Precision.W8A8, Precision.W4A8_FP8):
        with pytest.raises(ConfigError, match=r"packed as int8-g64; use --precision w4a8$"):
            loading.served_precision(asked, CPU, checkpoint)
    assert loading.served_precision(Precision.AUTO, CPU, checkpoint) is Precision.W4A8


@pytest.mark.parametrize(
    ("bias", "centred", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_keys_with_biases_that_nothing_centred_are_told(
    bias: bool, centred: bool, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    attention = SimpleNamespace(k_offset_GC=torch.zeros(2, 128) if centred else None)
    model: Any = SimpleNamespace(
        config=dataclasses.replace(config(), qkv_bias=bias),
        blocks=[SimpleNamespace(attention=attention)],
    )
    building._tell_of_biased_keys(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * told


@pytest.mark.parametrize(
    ("width", "capability", "bias", "told"),
    [
        (128, (9, 0), False, 1),
        (128, (9, 0), True, 1),
        (96, (9, 0), False, 0),
        (128, (7, 5), False, 0),
    ],
)
def test_eight_bits_are_advised_only_where_they_can_be_had(
    width: int,
    capability: tuple[int, int],
    bias: bool,
    told: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model: Any = SimpleNamespace(
        config=dataclasses.replace(config(width), qkv_bias=bias),
        precision=Precision.BFLOAT16,
        frequencies=SimpleNamespace(device=GPU),
    )
    building._tell_of_float_pages(model)
    assert len(caplog.messages) == told
    assert all("--kv-pages int8" in message for message in caplog.messages)
    assert all(("biases" in message) == bias for message in caplog.messages)

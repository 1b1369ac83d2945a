"""Checkpoints in the quantised formats of the hub, written by hand from their definitions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.streaming import StreamingReader
from tests.cpu.driving import load_tiny

Find = Callable[[str], Path]
Coded = tuple[dict[str, Tensor], Tensor]
"""The parts a module's weight is stored in, and the weight they stand for."""

FP8 = torch.float8_e4m3fn
FAMILY = "mixtral"


def grouped(weight: Tensor, group: int, bits: int, *, zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in -2^(bits-1) .. 2^(bits-1) - 1, with scale and zero point [O, K / group]; the last
    group may be a part of one."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    whole = F.pad(weight, (0, -weight.shape[1] % group))
    parts = whole.unflatten(-1, (-1, group))
    if zero:
        least, most = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = ((most - least) / (high - low)).to(torch.bfloat16)
        point = (low - least / scale.float()).round().clamp(low, high)
    else:
        scale = (parts.abs().amax(-1) / high).to(torch.bfloat16)
        point = torch.zeros_like(scale).float()
    codes = (parts / scale.float()[..., None] + point[..., None]).round().clamp(low, high)
    codes = codes.flatten(-2)[:, : weight.shape[1]]
    return codes.to(torch.int8), scale, point.to(torch.int8)


def int32_words(codes: Tensor, bits: int) -> Tensor:
    """compressed-tensors' packing, one number after the other."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for channel in range(codes.shape[1]):
        unsigned = codes[:, channel].long() + (1 << (bits - 1))
        words[:, channel // per_word] += unsigned << bits * (channel % per_word)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def packed(group: int, bits: int = 4, *, zero: bool = False) -> Callable[[Tensor], Coded]:
    def code(weight: Tensor) -> Coded:
        codes, scale, point = grouped(weight, group, bits, zero=zero)
        parts = {
            "weight_packed": int32_words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if zero:
            parts["weight_zero_point"] = int32_words(point.T, bits).T.contiguous()
        spread, points = (
            part.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
            for part in (scale, point)
        )
        return parts, (codes.float() - points) * spread

    return code


def int8_per_channel(weight: Tensor) -> Coded:
    codes, scale, _ = grouped(weight, weight.shape[1], 8, zero=False)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def fp8_per_channel(weight: Tensor) -> Coded:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    codes = (weight / scale).to(FP8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_per_tensor(weight: Tensor) -> Coded:
    scale = weight.abs().amax().reshape(1) / 448
    codes = (weight / scale).to(FP8)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.5])}
    return parts, codes.float() * scale


def fp8_blocks(block: int, name: str = "weight_scale_inv") -> Callable[[Tensor], Coded]:
    def code(weight: Tensor) -> Coded:
        rows, columns = (-(-size // block) for size in weight.shape)
        scale = torch.empty(rows, columns)
        whole = torch.empty_like(weight)
        codes = torch.empty_like(weight, dtype=FP8)
        for i in range(rows):
            for j in range(columns):
                tile = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                scale[i, j] = weight[tile].abs().max() / 448
                codes[tile] = (weight[tile] / scale[i, j]).to(FP8)
                whole[tile] = codes[tile].float() * scale[i, j]
        return {"weight": codes, name: scale}, whole

    return code


def fp8_powers_of_two(weight: Tensor) -> Coded:
    """Scales that have no mantissa, as DeepSeek stores them in float8_e8m0fnu."""
    scale = torch.exp2((weight.abs().amax(-1, keepdim=True) / 448).log2().ceil())
    codes = (weight / scale).to(FP8)
    parts = {"weight": codes, "weight_scale": scale.to(torch.float8_e8m0fnu)}
    return parts, codes.float() * scale


def compressed(kind: str, weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    defaults = {"actorder": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    group = {
        "targets": ["Linear"],
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token"},
        "output_activations": None,
        "weights": {"symmetric": True, "block_structure": None, **defaults, **weights},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense", "targets": []},
        "ignore": ["lm_head", "re:.*gate"],
        "config_groups": {"group_0": group},
        **fields,
    }


def ints(bits: int = 4, strategy: str = "group", **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


def floats(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, **more}


BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Coded]]] = {
    "w4a16": (compressed("pack-quantized", ints(group_size=16)), packed(16)),
    "w4-zero": (
        compressed("pack-quantized", ints(group_size=32, symmetric=False)),
        packed(32, zero=True),
    ),
    # 64 and 96 channels are not whole groups of 40, but could be of 32.
    "w4-partial-groups": (
        compressed("pack-quantized", ints(group_size=40, symmetric=False)),
        packed(40, zero=True),
    ),
    "w8a16": (compressed("pack-quantized", ints(8, group_size=16)), packed(16, 8)),
    "w8a8": (compressed("int-quantized", ints(8, "channel")), int8_per_channel),
    "fp8-channel": (compressed("float-quantized", floats("channel")), fp8_per_channel),
    "fp8-tensor": (compressed("float-quantized", floats("tensor")), fp8_per_tensor),
    "fp8-block": (
        compressed("float-quantized", floats("block", block_structure=[40, 40])),
        fp8_blocks(40, "weight_scale"),
    ),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_per_tensor),
    "qwen": (BLOCKS | {"weight_block_size": [32, 32]}, fp8_blocks(32)),
    "deepseek": (
        BLOCKS | {"weight_block_size": [40, 40], "scale_fmt": "ue8m0"},
        fp8_blocks(40),
    ),
    "powers of two": (BLOCKS | {"scale_fmt": "ue8m0"}, fp8_powers_of_two),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8_per_channel,
    ),
}


@pytest.fixture
def published(checkpoint: Find, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """A tiny checkpoint in a quantised format, and the weights that it stands for."""

    def make(config: dict[str, Any], code: Callable[[Tensor], Coded]) -> Any:
        path = tmp_path / "published"
        shutil.copytree(checkpoint(FAMILY), path)
        stored, plain = {}, {}
        for name, tensor in load_file(path / "model.safetensors").items():
            if name.endswith("proj.weight") or ".experts." in name:
                parts, plain[name] = code(tensor)
                stored |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
            else:
                stored[name] = plain[name] = tensor
        save_file(stored, path / "model.safetensors")
        fields = json.loads((path / "config.json").read_text())
        fields["quantization_config"] = config
        (path / "config.json").write_text(json.dumps(fields))
        return path, plain

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_their_codes_stand_for(
    name: str, published: Callable[..., tuple[Path, dict[str, Tensor]]], checkpoint: Find
) -> None:
    path, plain = published(*FORMATS[name])
    reader = DirectoryCheckpoint(path)
    assert "quantization_config" not in reader.fields()
    assert dict(reader.shapes()) == {name: tuple(tensor.shape) for name, tensor in plain.items()}
    streamed = StreamingReader(torch.device("cpu"))
    for read in (reader.tensors(set(plain)), reader.tensors(set(plain), streamed)):
        left = dict(plain)
        for tensor_name, tensor in read:
            wanted = left.pop(tensor_name)
            torch.testing.assert_close(tensor.float(), wanted, rtol=1e-6, atol=1e-7)
        assert not left
    original = load_file(checkpoint(FAMILY) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[name], original[name])


def test_a_quantised_checkpoint_is_served(
    published: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    """Through the whole loader: every stored tensor is used, and every parameter is filled."""
    path, plain = published(*FORMATS["w4a16"])
    model = load_tiny(path)
    rows = model.blocks[0].attention.qkv.weight.weight[:64]  # type: ignore[union-attr]
    torch.testing.assert_close(rows, plain["model.layers.0.self_attn.q_proj.weight"])


def test_parts_may_lie_in_different_files(
    published: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    path, plain = published(*FORMATS["qwen"])
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    scales = {name: t for name, t in tensors.items() if name.endswith("_inv")}
    save_file(scales, path / "a.safetensors")
    rest = {name: t for name, t in tensors.items() if name not in scales}
    save_file(rest, path / "b.safetensors")
    read = dict(DirectoryCheckpoint(path).tensors(set(plain)))
    for name, wanted in plain.items():
        torch.testing.assert_close(read[name].float(), wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'"),
    "bits": (compressed("pack-quantized", ints(3)), "weights.num_bits = 3"),
    "order": (compressed("pack-quantized", ints(actorder="group")), "weights.actorder = 'group'"),
    "floats": (compressed("nvfp4-pack-quantized", floats("group")), "format = 'nvfp4-pack"),
    "cache": (
        compressed("pack-quantized", ints(), kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme",
    ),
    "sparse": (
        compressed("pack-quantized", ints(), sparsity_config={"format": "sparse-24"}),
        "sparsity_config",
    ),
    "e5m2": (BLOCKS | {"fmt": "e5m2"}, "fmt = 'e5m2'"),
    "unknown": (BLOCKS | {"brand_new": 3}, "brand_new = 3"),
    "group": (compressed("pack-quantized", ints(group_size="32")), "weights.group_size = '32'"),
    "size": (BLOCKS | {"weight_block_size": [128]}, "weight_block_size = [128]"),
    "no object": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(
    name: str, published: Callable[..., tuple[Path, dict[str, Tensor]]]
) -> None:
    config, named = REFUSED[name]
    path, _ = published(config, int8_per_channel)
    with pytest.raises(CheckpointError) as caught:
        load_tiny(path)
    said = str(caught.value)
    assert named in said
    assert "quantization_config" in said
    assert "fourfold quantize" in said
    assert "\n" not in said


def test_codes_without_a_scale_are_refused(
    published: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    def code(weight: Tensor) -> Coded:
        parts, whole = fp8_blocks(32)(weight)
        return {"weight": parts["weight"]}, whole

    path, _ = published(FORMATS["qwen"][0], code)
    with pytest.raises(CheckpointError, match="has no weight_scale"):
        load_tiny(path)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("w4a16", {"weight": torch.randn(64, 64)}),
        ("w4a16", {"weight": torch.ones(64, 64, dtype=torch.int8)}),
        ("qwen", {"weight_scale": torch.ones(2, 2)}),
    ],
)
def test_a_weight_in_two_forms_is_refused(
    name: str,
    more: dict[str, Tensor],
    published: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    path, _ = published(*FORMATS[name])
    module = "model.layers.1.self_attn.q_proj"
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"{module}.{part}": tensor for part, tensor in more.items()}
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{module} is stored in two forms"):
        load_tiny(path)


@pytest.mark.parametrize(
    ("part", "stored_as"),
    [
        ("weight_scale", torch.uint8),  # exponents of two, perhaps
        ("weight_scale", torch.int32),
        ("weight_zero_point", torch.uint8),
        ("weight_shape", torch.float32),
    ],
)
def test_numbers_in_a_dtype_that_could_mean_others_are_refused(
    part: str, stored_as: torch.dtype, published: Callable[..., tuple[Path, dict[str, Tensor]]]
) -> None:
    config, code = FORMATS["w4-zero"]

    def other(weight: Tensor) -> Coded:
        parts, whole = code(weight)
        return parts | {part: parts[part].to(stored_as)}, whole

    path, _ = published(config, other)
    with pytest.raises(CheckpointError, match=rf"{part} is .*; (use|fetch)"):
        load_tiny(path)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (BLOCKS | {"weight_block_size": [128, 128]}, fp8_blocks(40)),
        # Of these nobody can tell how wide a block is: 64 may be two of 32 or one and a half of 40.
        (BLOCKS, fp8_blocks(40)),
        (compressed("pack-quantized", ints()), packed(40)),
        (compressed("pack-quantized", ints(group_size=16)), packed(32)),
    ],
)
def test_scales_that_fit_no_size_that_is_named_are_refused(
    config: dict[str, Any],
    code: Callable[[Tensor], Coded],
    published: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    path, _ = published(config, code)
    with pytest.raises(CheckpointError, match=r"scales .* do not fit"):
        DirectoryCheckpoint(path).shapes()

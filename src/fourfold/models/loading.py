"""Builds a `Decoder` and fills it from a checkpoint, straight to its device and precision.

Memory stays bounded: tensors are memory-mapped, and a layer is quantised as soon as it is filled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.w8a8_gemm import exact_on_cpu
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.checkpoint.tensors import Checkpoint
from fourfold.models.config import ConfigReader, ModelConfig
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Family, Placements
from fourfold.models.families.registry import find_family
from fourfold.models.filling import CheckpointFiller, Filler, Progress, RandomFiller
from fourfold.models.layers import Linear, SparseFFN
from fourfold.models.precision import Precision
from fourfold.models.rotation import Rotation, input_turn
from fourfold.models.router import UniformRouter
from fourfold.models.upcycle import upcycle
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import DenseWeight, W8A8Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where and how a model is loaded."""

    device: torch.device = torch.device("cpu")
    precision: Precision = Precision.AUTO
    dummy: bool = False
    """Random weights instead of the checkpoint's; only its configuration is read."""
    uniform_routing: bool = False
    """Route evenly whatever the tokens say; only with `dummy`."""

    def __post_init__(self) -> None:
        if self.uniform_routing and not self.dummy:
            raise ConfigError(
                "uniform routing makes real weights answer nonsense; add --load dummy"
            )


def resolve_device(device: str) -> torch.device:
    """The device that was named, or for `auto` the first GPU if there is one. `ConfigError` where
    it does not exist."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} does not exist; this machine has {count} GPUs")
    if wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    return wanted


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """The precision to serve in; `ConfigError` where the device cannot do what was asked.

    AUTO is bfloat16 on a GPU. On a CPU it is W8A8 where int8 products are exact (VNNI), else
    bfloat16 where the CPU multiplies it natively, else float32.
    """
    if asked is Precision.W8A8:
        if device.type != "cpu":
            raise ConfigError("precision w8a8 runs on the CPU only; use bfloat16 on a GPU")
        if not exact_on_cpu():
            raise ConfigError("this CPU has no exact int8 products; use --precision float32")
    if asked is not Precision.AUTO:
        return asked
    if device.type != "cpu":
        return Precision.BFLOAT16
    if exact_on_cpu():
        return Precision.W8A8
    return Precision.BFLOAT16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else Precision.FLOAT32


def activation_dtype(precision: Precision) -> torch.dtype:
    """What hidden states are kept in."""
    return torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32


def page_dtype(precision: Precision) -> torch.dtype:
    """What keys and values are kept in: 16 bits wherever the device multiplies them natively."""
    if precision is Precision.W8A8 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return activation_dtype(precision)


def kv_dtype(model: Decoder) -> torch.dtype:
    """`page_dtype` of the precision a model was loaded in."""
    if isinstance(model.head.weight, W8A8Weight):
        return page_dtype(Precision.W8A8)
    return model.embedding.weight.dtype


def open_checkpoint(source: Source) -> Checkpoint:
    """The checkpoint's reader; only its index is read yet."""
    if source.kind is SourceKind.DIRECTORY:
        from fourfold.models.checkpoint.directory import DirectoryCheckpoint

        return DirectoryCheckpoint(source.path)
    from fourfold.models.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint(source.path)


def read_model_config(fields: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family and configuration of a config.json; every field is honoured or refused."""
    family = find_family(fields.get("model_type"), where)
    reader = ConfigReader(fields, where)
    config = family.read_config(reader)
    reader.finish()
    return family, config


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, placements: Placements) -> None:
    """Raises `CheckpointError` naming tensors that are missing, left over or misshapen."""
    shapes = checkpoint.shapes()
    unneeded = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        unneeded.add("lm_head.weight")
    missing = sorted(set(placements) - set(shapes))
    extra = sorted(set(shapes) - set(placements) - unneeded)
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(place.shape)}"
        for name, place in placements.items()
        if name in shapes and shapes[name] != place.shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not used", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.where}: {'; '.join(problems)}")


def check_widths(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `CheckpointError` where a GPU could not multiply the experts' matrices."""
    if device.type != "cuda" or config.moe is None:
        return
    step = 16 // dtype.itemsize  # torch's grouped product wants rows of whole 16 bytes
    if config.width % step or config.moe.expert_width % step:
        raise CheckpointError(
            f"experts of {config.width} x {config.moe.expert_width} cannot be multiplied on a GPU, "
            f"which needs multiples of {step} as {dtype}; use --device cpu"
        )


def load_model(
    source: Source, options: LoadOptions, progress: Progress = lambda done, total: None
) -> Decoder:
    """The model, ready to compute. Raises `CheckpointError` or `ConfigError`."""
    precision = choose_precision(options.precision, options.device)
    checkpoint = open_checkpoint(source)
    family, config = read_model_config(checkpoint.fields(), checkpoint.where)
    dtype = activation_dtype(precision)
    check_widths(config, options.device, dtype)
    with torch.device("meta"):
        model = Decoder(config)
    placements = family.place(config)
    if options.dummy:
        filler: Filler = RandomFiller(model, placements, options.device, dtype)
    else:
        check_tensors(checkpoint, config, placements)
        filler = CheckpointFiller(model, placements, options.device, dtype, checkpoint, progress)
    rotation = Rotation(config) if precision is Precision.W8A8 else None
    for layer, block in enumerate(model.blocks):
        filler.fill(f"layers.{layer}.")
        if rotation is not None:
            rotation.rotate_block(block)
            quantize_weights(block)
    filler.fill("")
    if config.tied_embeddings:
        model.head.weight = DenseWeight(model.embedding.weight)
    if rotation is not None:
        rotation.rotate_ends(model)
        quantize_weights(model.head)
    if source.kind is SourceKind.EMBEDDED:
        upcycle(model)
    if options.uniform_routing:
        route_uniformly(model)
    model.frequencies = model.frequencies.to(options.device)
    return model.eval()


def quantize_weights(part: nn.Module) -> None:
    """Makes every dense weight of a part of the model int8, in place.

    What a gated FFN's last product reads has outliers of its own, so it is turned on the way.
    """
    for name, module in list(part.named_modules()):
        if isinstance(module, Linear):
            assert isinstance(module.weight, DenseWeight)
            weight = module.weight.weight
            turn = input_turn(weight.shape[-1]) if name.endswith("ffn.down") else None
            module.weight = W8A8Weight.quantize(weight, turn)
        elif isinstance(module, ExpertWeights):
            assert isinstance(module.gate_up, DenseWeight)
            assert isinstance(module.down, DenseWeight)
            down = module.down.weight
            module.gate_up = W8A8Weight.quantize(module.gate_up.weight)
            module.down = W8A8Weight.quantize(down, input_turn(down.shape[-1]))


def route_uniformly(model: Decoder) -> None:
    """Replaces every router by one that spreads tokens evenly over the experts."""
    for layer, block in enumerate(model.blocks):
        if isinstance(block.ffn, SparseFFN):
            router = block.ffn.router
            even = UniformRouter(router.config, model.config.width, layer)
            even.weight, even.selection_bias = router.weight, router.selection_bias
            block.ffn.router = even

"""Builds a `Decoder` and fills it from a checkpoint, straight to its device and precision.

Memory stays bounded: tensors are memory-mapped and copied one by one into their place, and a
parameter is quantised as soon as its last part has arrived.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.w8a8_gemm import exact_on_cpu
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.checkpoint.tensors import Checkpoint
from fourfold.models.config import ConfigReader, ModelConfig
from fourfold.models.decoder import Decoder
from fourfold.models.family import Family, Placement, Placements
from fourfold.models.layers import SparseFFN
from fourfold.models.precision import Precision
from fourfold.models.registry import find_family
from fourfold.models.router import Router, UniformRouter
from fourfold.models.upcycle import upcycle
from fourfold.quantize.weights import DenseWeight, W8A8Weight

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where and how a model is loaded. `device` as torch spells it, for instance `cuda:0`."""

    device: str = "cpu"
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


def resolve_device(device: str) -> str:
    """The device that was named, or for `auto` the first GPU if there is one. `ConfigError` where
    it does not exist."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} does not exist; this machine has {count} GPUs")
    if wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    return device


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


def kv_dtype(model: Decoder) -> torch.dtype:
    """What keys and values are kept in: 16 bits wherever the device multiplies them natively."""
    dtype = model.embedding.weight.dtype
    if isinstance(model.head.weight, W8A8Weight) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return dtype


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


def load_model(
    source: Source, options: LoadOptions, progress: Progress = lambda done, total: None
) -> Decoder:
    """The model, ready to compute. Raises `CheckpointError` or `ConfigError`."""
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    checkpoint = open_checkpoint(source)
    family, config = read_model_config(checkpoint.fields(), checkpoint.where)
    with torch.device("meta"):
        model = Decoder(config)
    filler = _Filler(model, family.place(config), device, precision)
    if options.dummy:
        filler.fill_randomly()
    else:
        check_tensors(checkpoint, config, filler.placements)
        filler.fill(checkpoint, progress)
    if source.kind is SourceKind.EMBEDDED:
        upcycle(model)
    if options.uniform_routing:
        route_uniformly(model)
    model.frequencies = model.frequencies.to(device)
    return model.eval()


def route_uniformly(model: Decoder) -> None:
    """Replaces every router by one that spreads tokens evenly over the experts."""
    for layer, block in enumerate(model.layers):
        if isinstance(block.ffn, SparseFFN):
            router = block.ffn.router
            even = UniformRouter(router.config, model.config.width, layer)
            even.weight, even.selection_bias = router.weight, router.selection_bias
            block.ffn.router = even


class _Filler:
    """Puts tensors where they belong and finishes each parameter when it is complete."""

    def __init__(
        self, model: Decoder, placements: Placements, device: torch.device, precision: Precision
    ) -> None:
        self.placements = placements
        self._model = model
        self._device = device
        self._precision = precision
        self._dtype = activation_dtype(precision)
        self._parts = Counter(place.parameter for place in placements.values())
        self._data: dict[str, Tensor] = {}

    def fill(self, checkpoint: Checkpoint, progress: Progress) -> None:
        done, total = 0, checkpoint.nbytes()
        for name, tensor, read in checkpoint.tensors(set(self.placements)):
            self._put(self.placements[name], tensor)
            done += read
            progress(done, total)

    def fill_randomly(self) -> None:
        """Normal weights of deviation 0.02, norms of one, the same on every start."""
        generator = torch.Generator(self._device).manual_seed(0)
        for place in self.placements.values():
            tensor = torch.empty(place.shape, dtype=self._dtype, device=self._device)
            if len(place.shape) == 1 and place.parameter.endswith("norm.weight"):
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)
            self._put(place, tensor)

    def _put(self, place: Placement, tensor: Tensor) -> None:
        data = self._data.get(place.parameter)
        if data is None:
            owner, attribute = self._find(place.parameter)
            shape = getattr(owner, attribute).shape
            dtype = torch.float32 if isinstance(owner, Router) else self._dtype
            data = torch.empty(shape, dtype=dtype, device=self._device)
            self._data[place.parameter] = data
        target = data if place.expert is None else data[place.expert]
        target[place.start : place.start + place.shape[0]].copy_(tensor)
        self._parts[place.parameter] -= 1
        if not self._parts[place.parameter]:
            self._finish(place.parameter, self._data.pop(place.parameter))

    def _finish(self, name: str, data: Tensor) -> None:
        owner, attribute = self._find(name)
        if isinstance(owner, DenseWeight) and self._precision is Precision.W8A8:
            holder, slot = self._parent_of(name)
            setattr(holder, slot, W8A8Weight.quantize(data))
        else:
            setattr(owner, attribute, nn.Parameter(data, requires_grad=False))
        if name == "embedding.weight" and self._model.config.tied_embeddings:
            quantised = self._precision is Precision.W8A8
            self._model.head.weight = W8A8Weight.quantize(data) if quantised else DenseWeight(data)

    def _find(self, name: str) -> tuple[nn.Module, str]:
        """The module and attribute that hold a parameter, inside its `Weight` if it is one."""
        holder, attribute = self._parent_of(name)
        value = getattr(holder, attribute)
        return (value, "weight") if isinstance(value, DenseWeight) else (holder, attribute)

    def _parent_of(self, name: str) -> tuple[nn.Module, str]:
        path, attribute = name.rsplit(".", 1)
        return self._model.get_submodule(path), attribute

"""Quantised checkpoints as they are published, presented as the weights their codes stand for.

Two ways of writing codes cover what the hub has of our families: `compressed-tensors` (4 or 8 bits
packed into int32, int8 or float8 with a scale per tensor, channel, group or block) and the
`fp8`, `fbgemm_fp8` methods (float8 with a scale per tensor, channel or block). The tensors say by
themselves how each module is stored, so lists of modules that were left out need not be read;
config.json is read to refuse what the tensors would not show. How activations were meant to be
rounded is no property of the weights: the precision that is served decides it.

Shapes: O output channels, K input channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import CheckpointError

_REMEDY = "use the original checkpoint; `fourfold quantize` makes 4-bit weights of it"
_CODES = ("weight_packed", "weight")
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point")
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_scale_ub")
CODE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors that make one weight: names in the files by what they hold; `shape` is [O, K]."""

    names: Mapping[str, str]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PublishedFormat:
    """A quantization_config that is honoured completely. `block` are the rows and columns that
    share a scale where scales are a matrix of both."""

    where: str
    block: tuple[int, int] | None

    def weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
    ) -> dict[str, Stored]:
        """The weights that come as codes, by their plain names (`....weight`), of all stored
        tensors; `shapes` has the contents of `weight_shape` tensors in place of their shapes."""
        found = {}
        for name, dtype in dtypes.items():
            module, _, kind = name.rpartition(".")
            if kind not in _CODES or dtype not in CODE_DTYPES:
                continue
            parts = {part: f"{module}.{part}" for part in (kind, *_COMPANIONS)}
            parts = {part: stored for part, stored in parts.items() if stored in dtypes}
            if not {"weight_scale", "weight_scale_inv"} & set(parts):
                raise CheckpointError(f"{self.where}: {name} has no weight_scale; fetch it again")
            if kind == "weight_packed" and "weight_shape" not in parts:
                raise CheckpointError(f"{self.where}: {name} has no weight_shape; fetch it again")
            shape = shapes[parts.get("weight_shape", name)]
            found[f"{module}.weight"] = Stored(parts, shape)
        return found

    def is_companion(self, name: str, weights: Mapping[str, Stored]) -> bool:
        """Whether a tensor belongs to a weight, or only says how inputs were to be rounded."""
        module, _, kind = name.rpartition(".")
        return f"{module}.weight" in weights and kind in (*_CODES, *_COMPANIONS, *_ACTIVATIONS)

    def decode(self, name: str, stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight of one module, float32 [O, K], from its parts."""
        outputs, inputs = stored.shape
        scale = parts["weight_scale" if "weight_scale" in parts else "weight_scale_inv"].float()
        zero = parts.get("weight_zero_point")
        if "weight_packed" in parts:
            packed = parts["weight_packed"]
            bits = 4 if packed.shape[1] == -(-inputs // 8) else 8
            codes = unpack_int32(packed, bits)[:, :inputs]
            if zero is not None and zero.dtype == torch.int32:
                zero = unpack_int32(zero.T, bits).T[:outputs]
        else:
            codes = parts["weight"]
        values = codes.float()
        if codes.shape != stored.shape:
            raise CheckpointError(
                f"{self.where}: the codes of {name} are {list(codes.shape)}, not "
                f"{list(stored.shape)}; fetch it again"
            )
        if zero is not None and bool(zero.float().any()):
            values = values - self._spread(name, zero.float(), stored.shape)
        return values * self._spread(name, scale, stored.shape)

    def _spread(self, name: str, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """One scale for each weight, from one a tensor, a channel, a group or a block."""
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        scale = scale[:, None] if scale.dim() == 1 else scale
        steps = []
        for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=True)):
            block = self.block[axis] if self.block is not None else 0
            if block and count == -(-size // block):
                steps.append(block)
            elif count in (1, size) or (not block and size % count == 0):
                steps.append(size // count)
            else:
                raise CheckpointError(
                    f"{self.where}: scales {list(scale.shape)} do not fit {name} {list(shape)}; "
                    f"{_REMEDY}"
                )
        whole = scale.repeat_interleave(steps[0], 0)[: shape[0]]
        return whole.repeat_interleave(steps[1], 1)[:, : shape[1]]


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [O, 32 / bits * P] of int32 words [O, P]: the lowest bits come first, and
    codes are stored with half their range added."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8).flatten(-2)


def read_published(config: Mapping[str, Any], where: str) -> PublishedFormat:
    """The format that a quantization_config describes. `CheckpointError` naming what we would not
    honour, and the remedy."""
    methods: dict[Any, Callable[[_Fields], tuple[int, int] | None]] = {
        "compressed-tensors": _read_compressed_tensors,
        "fp8": _read_fp8,
        "fbgemm_fp8": _read_fbgemm,
    }
    fields = _Fields(config, where, "quantization_config")
    method = fields.take("quant_method", *methods)
    block = methods[method](fields)
    fields.finish()
    return PublishedFormat(where, block)


class _Fields:
    """Takes fields of an object of config.json one by one and refuses what is left."""

    def __init__(self, fields: Any, where: str, path: str) -> None:
        self._where, self._path = where, path
        if not isinstance(fields, dict):
            raise CheckpointError(f"{where}: {path} = {fields!r} is not an object; {_REMEDY}")
        self._left = dict(fields)

    def take(self, name: str, *honoured: Any) -> Any:
        """A field whose value must be among those that we compute."""
        value = self._left.pop(name, None)
        if not any(value == known and type(value) is type(known) for known in honoured):
            allowed = " or ".join(map(repr, honoured))
            raise self.refuse(name, value, f"only {allowed}")
        return value

    def pair(self, name: str) -> tuple[int, int] | None:
        """Two positive integers, or nothing."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, str):
            value = [int(part) if part.isdigit() else part for part in value.split("x")]
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(entry) is not int or entry < 1 for entry in value)
        ):
            raise self.refuse(name, value, "only two sizes")
        return value[0], value[1]

    def groups(self, name: str) -> list[_Fields]:
        value = self._left.pop(name, None)
        if not isinstance(value, dict) or not value:
            raise self.refuse(name, value, "only an object of groups")
        path = f"{self._path}.{name}"
        return [_Fields(entry, self._where, f"{path}.{key}") for key, entry in value.items()]

    def child(self, name: str) -> _Fields:
        return _Fields(self._left.pop(name, None), self._where, f"{self._path}.{name}")

    def ignore(self, *names: str) -> None:
        """Fields that change nothing about what the tensors stand for."""
        for name in names:
            self._left.pop(name, None)

    def ignore_if(self, name: str, field: str, value: str) -> None:
        """An object that changes nothing if one of its fields has a certain value."""
        left = self._left.get(name)
        if isinstance(left, dict) and left.get(field) == value:
            del self._left[name]

    def finish(self) -> None:
        left = {name: value for name, value in self._left.items() if value}
        if left:
            name, value = min(left.items())
            raise self.refuse(name, value, "not known")

    def refuse(self, name: str, value: Any, why: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) < 100 else f"{shown[:100]}..."
        return CheckpointError(
            f"{self._where}: {self._path}.{name} = {shown} is not supported ({why}); {_REMEDY}"
        )


def _read_compressed_tensors(fields: _Fields) -> tuple[int, int] | None:
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    fields.take("format", *formats, "mixed-precision")
    fields.take("quantization_status", "compressed", "frozen", None)
    fields.ignore("ignore", "global_compression_ratio", "version")
    fields.ignore_if("sparsity_config", "format", "dense")
    block = None
    for group in fields.groups("config_groups"):
        group.take("format", *formats, None)
        group.ignore("targets", "input_activations")
        weights = group.child("weights")
        if weights.take("type", "int", "float") == "float":
            weights.take("num_bits", 8)
        else:
            weights.take("num_bits", 4, 8)
        weights.take("strategy", "tensor", "channel", "group", "block")
        weights.take("actorder", None, False, "weight", "static")
        weights.take("dynamic", None, False)
        block = weights.pair("block_structure") or block
        weights.ignore("symmetric", "group_size", "observer", "observer_kwargs")
        weights.ignore("scale_dtype", "zp_dtype")
        weights.finish()
        group.finish()
    return block


def _read_fp8(fields: _Fields) -> tuple[int, int] | None:
    fields.take("fmt", "e4m3", None)
    fields.take("activation_scheme", "dynamic", "static", None)
    fields.take("scale_fmt", "ue8m0", "float", None)
    fields.ignore("modules_to_not_convert", "ignored_layers", "ignore")
    return fields.pair("weight_block_size")


def _read_fbgemm(fields: _Fields) -> None:
    fields.ignore("modules_to_not_convert", "activation_scale_ub")

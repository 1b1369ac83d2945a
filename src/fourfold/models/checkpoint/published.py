"""Quantised checkpoints as they are published, presented as the weights their codes stand for.

Two ways of writing codes cover what the hub has of our families: `compressed-tensors` (4 or 8 bits
packed into int32, int8 or float8 with a scale per tensor, channel, group or block) and the
`fp8`, `fbgemm_fp8` methods (float8 with a scale per tensor, channel or block). The tensors say by
themselves how each module is stored, so lists of modules that were left out need not be read;
config.json is read to refuse what the tensors would not show, and for how many channels share a
scale: where the last of them are fewer, their number does not say. How activations were meant to be
rounded is no property of the weights: the precision that is served decides it.

Shapes: O output channels, K input channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import CheckpointError

_REMEDY = "use the original checkpoint; `fourfold quantize` makes 4-bit weights of it"
# What codes may be stored in, and what goes with them.
_CODES = {"weight_packed": ("I32",), "weight": ("F8_E4M3", "I8")}
_SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_ZERO_POINTS = (*_SCALES, "F8_E4M3", "I32", "I8")
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point")
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_scale_ub")
Blocks = frozenset[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors that make one weight: names in the files by what they hold; `shape` is [O, K]."""

    names: Mapping[str, str]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PublishedFormat:
    """A quantization_config that is honoured completely. `blocks` are the rows and columns that
    share a scale, as config.json names them: (1, size) for groups."""

    where: str
    blocks: Blocks

    def weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
    ) -> dict[str, Stored]:
        """The weights that come as codes, by their plain names (`....weight`), of all stored
        tensors; `shapes` has the contents of `weight_shape` tensors in place of their shapes."""
        found = {}
        for name, dtype in dtypes.items():
            module, _, kind = name.rpartition(".")
            if dtype not in _CODES.get(kind, ()):
                continue
            parts = {part: f"{module}.{part}" for part in (kind, *_COMPANIONS)}
            parts = {part: stored for part, stored in parts.items() if stored in dtypes}
            if not {"weight_scale", "weight_scale_inv"} & set(parts):
                raise CheckpointError(f"{self.where}: {name} has no weight_scale; fetch it again")
            if kind == "weight_packed" and "weight_shape" not in parts:
                raise CheckpointError(f"{self.where}: {name} has no weight_shape; fetch it again")
            for part, stored in parts.items():
                known = _ZERO_POINTS if part == "weight_zero_point" else _SCALES
                if part not in (kind, "weight_shape") and dtypes[stored] not in known:
                    # Numbers in other clothes: exponents in uint8, say.
                    raise CheckpointError(
                        f"{self.where}: {stored} is stored as {dtypes[stored]}, of which the "
                        f"numbers meant are not known; {_REMEDY}"
                    )
            shape = shapes[parts.get("weight_shape", name)]
            scales = shapes[parts.get("weight_scale", f"{module}.weight_scale_inv")]
            self._block(name, scales, shape)
            if f"{module}.weight" in found or {"weight_scale", "weight_scale_inv"} <= set(parts):
                raise stored_twice(self.where, module)
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
        rows, columns = self._block(name, tuple(scale.shape), shape)
        whole = scale.view(len(scale), -1).repeat_interleave(rows, 0)[: shape[0]]
        return whole.repeat_interleave(columns, 1)[:, : shape[1]]

    def _block(self, name: str, scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns of a weight that share one of its scales."""
        if len(shape) == 2:
            rows, columns = shape
            if math.prod(scales) == 1:
                return rows, columns
            wanted = (*scales, 1) if len(scales) == 1 else scales
            known = {(1, columns)} | {(min(r, rows), min(c, columns)) for r, c in self.blocks}
            fitting = [(r, c) for r, c in known if (-(-rows // r), -(-columns // c)) == wanted]
            if len(fitting) == 1:
                return fitting[0]
        raise CheckpointError(
            f"{self.where}: scales {list(scales)} do not fit {name} {list(shape)} in "
            f"blocks of {sorted(self.blocks)}; {_REMEDY}"
        )


def stored_twice(where: str, module: str) -> CheckpointError:
    """Of a weight that comes in two forms, which need not be the same."""
    return CheckpointError(
        f"{where}: the weight of {module} is stored in two forms, and which is meant nobody can "
        "tell; fetch it again"
    )


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [O, 32 / bits * P] of int32 words [O, P]: the lowest bits come first, and
    codes are stored with half their range added."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8).flatten(-2)


def read_published(config: Mapping[str, Any], where: str) -> PublishedFormat:
    """The format that a quantization_config describes. `CheckpointError` naming what we would not
    honour, and the remedy."""
    methods: dict[Any, Callable[[_Fields], Blocks]] = {
        "compressed-tensors": _read_compressed_tensors,
        "fp8": _read_fp8,
        "fbgemm_fp8": _read_fbgemm,
    }
    fields = _Fields(config, where, "quantization_config")
    method = fields.take("quant_method", *methods)
    blocks = methods[method](fields)
    fields.finish()
    return PublishedFormat(where, blocks)


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

    def group(self, name: str) -> Blocks:
        """How many columns share a scale: a positive integer, or nothing (-1: all)."""
        value = self._left.pop(name, None)
        if value is None or value == -1:
            return frozenset()
        if type(value) is not int or value < 1:
            raise self.refuse(name, value, "only a size")
        return frozenset({(1, value)})

    def block(self, name: str) -> Blocks:
        """How many rows and columns share a scale: two positive integers, or nothing."""
        value = self._left.pop(name, None)
        if value is None:
            return frozenset()
        if isinstance(value, str):
            value = [int(part) if part.isdigit() else part for part in value.split("x")]
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(entry) is not int or entry < 1 for entry in value)
        ):
            raise self.refuse(name, value, "only two sizes")
        return frozenset({(value[0], value[1])})

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


def _read_compressed_tensors(fields: _Fields) -> Blocks:
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    fields.take("format", *formats, "mixed-precision")
    fields.take("quantization_status", "compressed", "frozen", None)
    fields.ignore("ignore", "global_compression_ratio", "version")
    fields.ignore_if("sparsity_config", "format", "dense")
    blocks: Blocks = frozenset()
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
        blocks |= weights.block("block_structure") | weights.group("group_size")
        weights.ignore("symmetric", "observer", "observer_kwargs")
        weights.ignore("scale_dtype", "zp_dtype")
        weights.finish()
        group.finish()
    return blocks


def _read_fp8(fields: _Fields) -> Blocks:
    fields.take("fmt", "e4m3", None)
    fields.take("activation_scheme", "dynamic", "static", None)
    fields.take("scale_fmt", "ue8m0", "float", None)
    fields.ignore("modules_to_not_convert", "ignored_layers", "ignore")
    return fields.block("weight_block_size")


def _read_fbgemm(fields: _Fields) -> Blocks:
    fields.ignore("modules_to_not_convert", "activation_scale_ub")
    return frozenset()

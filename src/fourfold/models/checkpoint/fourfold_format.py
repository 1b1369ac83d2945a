"""The checkpoints that `fourfold quantize` writes: weights packed as the kernels read them.

config.json is the model's own, with a quantization_config of `quant_method` fourfold. Tensors keep
their Hugging Face names; a weight [O, K] that is quantised is stored in parts:

    ....weight_packed    uint8 [B, O, 64]   4-bit codes, see `kernels.w4a8_gemm.packing`
    ....weight_group     [G, O]             parameters of groups, for recipes that have them
    ....weight_codes     int8 [O, K]        8-bit codes, in place of 4-bit ones
    ....weight_scale     float32 [O]
    ....weight_shape     int64 [2]          O and K
    ....self_attn.k_offset  float32 [G, C]  mean rotated key of each KV head, for 8-bit pages

Weights are rotated (`models.rotation`): the norms' weights are folded in and are ones, embedding
and head are two tensors, and what a gated FFN's `down` reads is turned while serving.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.kernels.w4a8_gemm.packing import (
    BLOCK,
    HALF,
    PackedW4A8,
    W4A8Recipe,
    dequantize,
    padded,
)
from fourfold.models.checkpoint.published import Stored, stored_twice
from fourfold.models.rotation import input_turn
from fourfold.quantize.weights import turned

METHOD = "fourfold"
VERSION = 1
K_OFFSET = "k_offset"
_PARTS = ("weight_packed", "weight_group", "weight_codes", "weight_scale", "weight_shape")


@dataclasses.dataclass(frozen=True)
class FourfoldFormat:
    """A quantization_config of ours. `recipe` is that of the 4-bit weights; `upcycled` says that
    dense FFNs become a mixture of experts that share them, as in the embedded default."""

    where: str
    recipe: W4A8Recipe
    upcycled: bool = False
    turned: tuple[str, ...] = ()
    """The last names of modules that read turned activations; their weights are stored turned."""
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How it was made, for readers: method, text, tokens."""

    @property
    def attention_bits(self) -> int:
        """Of the weights of attention's projections."""
        return 4 if str(self.made.get("attention_bits")) == "4" else 8

    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "recipe": str(self.recipe),
            "rotated": True,
            "turned": list(self.turned),
            "upcycled": self.upcycled,
            "made": dict(self.made),
        }

    def weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
    ) -> dict[str, Stored]:
        """The quantised weights by their plain names; see `PublishedFormat.weights`."""
        found = {}
        for name in dtypes:
            module, _, kind = name.rpartition(".")
            if kind not in ("weight_packed", "weight_codes"):
                continue
            parts = {part: f"{module}.{part}" for part in _PARTS}
            parts = {part: stored for part, stored in parts.items() if stored in dtypes}
            grouped = kind == "weight_packed" and self.recipe.group is not None
            needed = {"weight_scale", "weight_shape"} | ({"weight_group"} if grouped else set())
            missing = sorted(needed - set(parts))
            if missing:
                raise CheckpointError(
                    f"{self.where}: {name} has no {missing[0]}; quantise the model again"
                )
            stored = Stored(parts, shapes[parts["weight_shape"]])
            expected = self._expected(stored.shape) if len(stored.shape) == 2 else {}
            for part, tensor in parts.items():
                if part != "weight_shape" and expected.get(part) != (
                    dtypes[tensor],
                    shapes[tensor],
                ):
                    raise CheckpointError(
                        f"{self.where}: {tensor} is {dtypes[tensor]} {list(shapes[tensor])}, which "
                        f"is no part of {list(stored.shape)} weights in {self.recipe}; "
                        "quantise the model again"
                    )
            if f"{module}.weight" in found:
                raise stored_twice(self.where, module)
            found[f"{module}.weight"] = stored
        return found

    def _expected(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of each part that a weight [O, K] may have."""
        outputs, inputs = shape
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("U8", (padded(inputs) // BLOCK, outputs, HALF)),
            "weight_codes": ("I8", (outputs, inputs)),
            "weight_scale": ("F32", (outputs,)),
        }
        if self.recipe.group is not None:
            dtype = "I16" if self.recipe.activations == torch.int8 else "U8"
            parts["weight_group"] = dtype, (padded(inputs) // self.recipe.group, outputs)
        return parts

    def is_companion(self, name: str, weights: Mapping[str, Stored]) -> bool:
        """Whether a tensor is part of a quantised weight, or helps 8-bit pages only."""
        module, _, kind = name.rpartition(".")
        return (f"{module}.weight" in weights and kind in _PARTS) or kind == K_OFFSET

    def decode(self, name: str, stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight that its parts stand for, float32 [O, K], turned back: of a model that is
        rotated, but otherwise plain."""
        if "weight_codes" in parts:
            weight = parts["weight_codes"].float() * parts["weight_scale"][:, None]
        else:
            weight = dequantize(packed_weight(self.recipe, stored.shape[1], parts))[0]
        turn = input_turn(stored.shape[1]) if name.split(".")[-2] in self.turned else None
        return weight if turn is None else turned(weight.contiguous(), turn.T.to(weight.device))


def packed_weight(recipe: W4A8Recipe, inputs: int, parts: Mapping[str, Tensor]) -> PackedW4A8:
    """A weight's stored parts as one packed weight (a stack of one)."""
    group = parts.get("weight_group")
    return PackedW4A8(
        recipe,
        inputs,
        parts["weight_packed"][None],
        parts["weight_scale"][None],
        None if group is None else group[None],
    )


def stored_parts(weight: PackedW4A8, slot: int, rows: slice) -> dict[str, Tensor]:
    """What is written of rows of one slot: the inverse of `packed_weight`."""
    parts = {
        "weight_packed": weight.packed_EBOJ[slot, :, rows],
        "weight_scale": weight.scale_EO[slot, rows],
    }
    if weight.group_EGO is not None:
        parts["weight_group"] = weight.group_EGO[slot, :, rows]
    outputs = parts["weight_scale"].shape[0]
    parts["weight_shape"] = torch.tensor([outputs, weight.inputs])
    return {name: tensor.contiguous() for name, tensor in parts.items()}


def read_fourfold(config: Mapping[str, Any], where: str) -> FourfoldFormat:
    """The format of our quantization_config. `CheckpointError` naming what is not honoured."""
    left = dict(config)

    def take(name: str, *honoured: Any) -> Any:
        value = left.pop(name, None)
        if value not in honoured:
            raise CheckpointError(
                f"{where}: quantization_config.{name} = {value!r} is not known; "
                "quantise the model again with this version"
            )
        return value

    take("quant_method", METHOD)
    take("version", VERSION)
    take("rotated", True)
    recipe = W4A8Recipe(take("recipe", *W4A8Recipe))
    upcycled = take("upcycled", True, False)
    names = left.pop("turned", None)
    if not isinstance(names, list):
        left["turned"] = names
    made = left.pop("made", None)
    for name in left:
        take(name)
    made = made if isinstance(made, dict) else {}
    return FourfoldFormat(where, recipe, upcycled, tuple(names or ()), made)

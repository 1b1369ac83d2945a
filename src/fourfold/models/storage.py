"""What a model's weights are kept in: bytes of each part, before any of it is loaded."""

from __future__ import annotations

import dataclasses

import torch

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.checkpoint.fourfold_format import FourfoldFormat
from fourfold.models.footprint import DENSE_FFN, EXPERTS, TIED
from fourfold.models.precision import Precision
from fourfold.models.quantising import RECIPES

_LOOKED_UP = ("embedding", "norms")


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the weights of a precision are kept; scales of output channels are left out."""

    precision: Precision
    on_gpu: bool
    recipe: W4A8Recipe | None = None
    """Of 4-bit weights, where there are any."""
    attention_bits: int = 8
    """Of attention's projections, where weights are quantised."""

    def bytes_held(self, part: str) -> float:
        """Bytes that one parameter of a part takes; tables that are looked up and norms stay
        unquantised, and a table that is also the head is there twice."""
        if not self.precision.quantised:
            return 2 if self.precision is Precision.BFLOAT16 else 4
        looked_up = 2 if self.on_gpu else 4
        if part in _LOOKED_UP:
            return looked_up
        return self.bytes_read(part) + (looked_up if part == TIED else 0)

    def bytes_read(self, part: str) -> float:
        """Bytes of one parameter of a part that a token reads which passes it."""
        if not self.precision.quantised or part in _LOOKED_UP:
            return self.bytes_held(part)
        four = part in (EXPERTS, DENSE_FFN) or (part == "attention" and self.attention_bits == 4)
        # On a CPU 4-bit codes are expanded to the int8 codes that they stand for.
        return self.recipe.bits / 8 if self.recipe is not None and four and self.on_gpu else 1


def storage_of(
    precision: Precision, device: torch.device, packed: FourfoldFormat | None
) -> Storage:
    """How a checkpoint, perhaps one that is packed, is kept once it is served in a precision."""
    on_gpu = device.type != "cpu"
    recipe = RECIPES.get(precision)
    if recipe is None or packed is None:
        return Storage(precision, on_gpu, recipe)
    return Storage(precision, on_gpu, packed.recipe, packed.attention_bits)

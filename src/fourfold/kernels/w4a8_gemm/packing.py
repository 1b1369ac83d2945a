"""How 4-bit weights lie in memory: the contract between `quantize.w4a8` and the W4A8 kernels.

The input axis is cut into blocks of 128 channels. A packed tile holds one block: byte j of a row
carries channel j in its low and channel 64 + j in its high nibble, so that one tile of 64 bytes
feeds two products of 64 channels without moving a weight between threads. All rows of a block lie
together, so a tile of rows is one contiguous run.

    packed_EBOJ  uint8 [E, B, O, 64]
    scale_EO     float32 [E, O]: weight ~ code * scale
    group_EGO    what groups of channels add to the code, or None (per channel):
                 INT8: int16, step | (offset << 8); code = nibble * step + offset - 128
                 FP8: uint8 exponent e in 0..12; code = (sign) magnitude * 2^e

Nibbles are two's complement (INT8_CHANNEL), unsigned (INT8 groups), or sign and magnitude (FP8:
bit 3 is the sign). With FP8 groups the nibbles of a 32-bit word are ordered for byte permutes: the
low half holds the four low-tile channels, the high half the four high-tile channels.

Shapes: E experts (1 for a dense weight), O output channels, K input channels, padded to 128,
B = K / 128 blocks, G = K / group groups.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
HALF = 64


class W4A8Recipe(enum.StrEnum):
    """Weights in 4 bits, activations in 8 bits per token; what scales the weights carry."""

    INT8_CHANNEL = "int8-channel"
    INT8_G128 = "int8-g128"
    INT8_G64 = "int8-g64"
    FP8_CHANNEL = "fp8-channel"
    FP8_G128 = "fp8-g128"

    @property
    def activations(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.value.startswith("fp8") else torch.int8

    @property
    def group(self) -> int | None:
        """Input channels that share a group's parameters; None where there are no groups."""
        tail = self.value.partition("-")[2]
        return None if tail == "channel" else int(tail.removeprefix("g"))

    @property
    def bits(self) -> float:
        """Of one weight with its share of its group's parameters: one byte of FP8's, two of
        int8's."""
        group_bits = 8 if self.activations is torch.float8_e4m3fn else 16
        return 4 + (0.0 if self.group is None else group_bits / self.group)


class PackedW4A8(NamedTuple):
    """One weight or a stack of experts' weights, packed. See the module for the layout."""

    recipe: W4A8Recipe
    inputs: int
    """Input channels before padding."""
    packed_EBOJ: Tensor
    scale_EO: Tensor
    group_EGO: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        tensors = (self.packed_EBOJ, self.scale_EO, self.group_EGO)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def padded(inputs: int) -> int:
    """Input channels after padding to whole blocks."""
    return -(-inputs // BLOCK) * BLOCK


def pack_nibbles(nibbles_EOK: Tensor, recipe: W4A8Recipe) -> Tensor:
    """uint8 nibbles [E, O, K] in 0..15 to packed [E, B, O, 64]; missing channels become zero."""
    experts, outputs, inputs = nibbles_EOK.shape
    whole = F.pad(nibbles_EOK, (0, padded(inputs) - inputs))
    low, high = whole.view(experts, outputs, -1, 2, HALF).transpose(1, 2).unbind(-2)
    if recipe is not W4A8Recipe.FP8_G128:
        return (low | (high << 4)).contiguous()
    # Words of 8 nibbles: four of the low tile, then four of the high tile.
    words = torch.cat([tile.view(*tile.shape[:-1], -1, 4) for tile in (low, high)], -1)
    return (words[..., 0::2] | (words[..., 1::2] << 4)).flatten(-2).contiguous()


def unpack_nibbles(packed_EBOJ: Tensor, recipe: W4A8Recipe) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [E, O, padded K]."""
    low, high = packed_EBOJ & 15, packed_EBOJ >> 4
    if recipe is W4A8Recipe.FP8_G128:
        words = torch.stack((low, high), -1).view(*low.shape[:-1], -1, 8)
        low, high = words[..., :4].flatten(-2), words[..., 4:].flatten(-2)
    both = torch.stack((low, high), -2).transpose(1, 2)
    return both.flatten(-3).contiguous()


def decode_nibbles(nibbles_EOK: Tensor, group_EGO: Tensor | None, recipe: W4A8Recipe) -> Tensor:
    """What nibbles [E, O, K] (K whole groups) stand for: float32 codes, `weight ~ code * scale_EO`.

    INT8 codes are integers in -128..127; FP8 codes are exact in e4m3 up to a power of two that is
    the same for the whole weight.
    """
    if group_EGO is None or recipe.group is None:
        return decode_with(nibbles_EOK, None, recipe)
    group_EOK = group_EGO.transpose(1, 2).repeat_interleave(recipe.group, -1)
    return decode_with(nibbles_EOK, group_EOK, recipe)


def decode_with(nibbles: Tensor, group: Tensor | None, recipe: W4A8Recipe) -> Tensor:
    """As `decode_nibbles`, for nibbles of any shape whose groups' parameters broadcast to them."""
    if recipe is W4A8Recipe.INT8_CHANNEL:
        signed = nibbles.to(torch.int8)
        return torch.where(signed > 7, signed - 16, signed).float()
    if recipe is W4A8Recipe.FP8_CHANNEL:
        return _sign_magnitude(nibbles)
    assert group is not None
    if recipe is W4A8Recipe.FP8_G128:
        return _sign_magnitude(nibbles) * torch.exp2(group.float())
    step, offset = (group & 255).float(), ((group >> 8) & 255).float()
    return nibbles.float().mul_(step).add_(offset - 128)


def dequantize(weight: PackedW4A8) -> Tensor:
    """The weights that a packed weight stands for, float32 [E, O, K]."""
    nibbles = unpack_nibbles(weight.packed_EBOJ, weight.recipe)
    codes = decode_nibbles(nibbles, weight.group_EGO, weight.recipe)
    return (codes * weight.scale_EO[..., None])[..., : weight.inputs]


def _sign_magnitude(nibbles: Tensor) -> Tensor:
    magnitude = (nibbles & 7).float()
    return torch.where(nibbles > 7, -magnitude, magnitude)

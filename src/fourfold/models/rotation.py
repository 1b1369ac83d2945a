"""Turns a model's inner axes so that 8-bit activations lose little, without changing its function.

Residual streams have a few channels far larger than the rest, and a per-token scale must span them.
An orthogonal rotation of the whole stream spreads them over all channels; it commutes with RMSNorm
once the norms' weights are folded into the matrices that read the stream, so it costs nothing when
serving. Values are rotated within their heads the same way. (The idea is QuaRot's, Ashkboos et al.
2024, with the rotations that can be folded into weights.)

Measured on the default model: docs/experiments-2026-11-24.md.

Shapes: W width of an axis, D model width, C head width, G KV heads, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold.models.config import ModelConfig
from fourfold.models.decoder import Block, Decoder
from fourfold.models.layers import DenseFFN, Linear, RMSNorm
from fourfold.quantize.weights import DenseWeight

_BLOCK = 32
TURNED = (".ffn.down.weight", ".ffn.shared.down.weight", ".experts.down")
"""How the names of parameters end whose inputs are turned while serving, by `input_turn`."""
_LARGEST_FACTOR = 128
"""A Hadamard matrix wider than this is applied as two."""


class Turn:
    """A random orthogonal matrix Q [W, W], float32: signs, a Hadamard matrix as large as divides
    the width, and a random rotation of what is left.

    It is a product of signs and Kronecker factors, and is applied one factor after the other: a
    width of 2048 costs 96 multiplications a number instead of 2048.
    """

    def __init__(self, width: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        power = width & -width
        odd = width // power
        mixed = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q
        signs_W = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
        few = 1 << (power.bit_length() - 1) // 2 if power > _LARGEST_FACTOR else 1
        factors = [mixed, _hadamard(few), _hadamard(power // few)]
        self.signs_W = (signs_W / power**0.5).float().to(device)
        """The signs, and what makes the Hadamard matrices orthogonal."""
        self._factors = [
            factor.float().contiguous().to(device) for factor in factors if len(factor) > 1
        ]

    def rows(self, x: Tensor, scale_W: Tensor | None = None) -> Tensor:
        """`(x * scale) @ Q` for rows [..., W], contiguous."""
        signs_W = self.signs_W if scale_W is None else self.signs_W * scale_W
        return self._columns((x * signs_W).unsqueeze(-1)).squeeze(-1)

    def columns(self, x: Tensor) -> Tensor:
        """`Q.T @ x` for matrices [..., W, N], contiguous."""
        return self._columns(x * self.signs_W[:, None])

    def _columns(self, x: Tensor) -> Tensor:
        shape, after = x.shape, x.shape[-1]
        for factor in reversed(self._factors):
            if after == 1:
                x = x.view(-1, len(factor)) @ factor
            else:
                x = factor.T @ x.view(-1, len(factor), after)
            after *= len(factor)
        return x.view(shape)


def _hadamard(width: int) -> Tensor:
    """Of ones and minus ones, symmetric; `width` is a power of two."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < width:
        upper, lower = torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)
        hadamard = torch.cat((upper, lower))
    return hadamard


def orthogonal(width: int, seed: int) -> Tensor:
    """The matrix of a `Turn`, float32 [width, width]."""
    return Turn(width, seed, torch.device("cpu")).rows(torch.eye(width))


def input_turn(width: int) -> Tensor | None:
    """A small rotation to apply while serving, to blocks of an activation of this width; None where
    blocks do not fit. Blocks of 32 were as good as larger ones."""
    return orthogonal(_BLOCK, seed=3) if width % _BLOCK == 0 else None


class Rotation:
    """The rotations of one model. Weights must be dense, in floating point, not yet quantised."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config = config
        self._stream = Turn(config.width, seed=1, device=device)
        self._head_CC = orthogonal(config.head_width, seed=2).to(device)

    def rotate_ends(self, model: Decoder) -> None:
        """Embedding, last norm and head; a head that shared the embedding's storage leaves it."""
        head = model.head.weight
        assert isinstance(head, DenseWeight)
        model.head.weight = DenseWeight(self._stream.rows(head.weight, model.norm.weight))
        _forget(model.norm)
        turned = self._stream.rows(model.embedding.weight)
        model.embedding.weight = nn.Parameter(turned, requires_grad=False)

    def rotate_block(self, block: Block) -> None:
        """One layer, in place."""
        attention = block.attention
        self._read(attention.qkv, block.attention_norm.weight)
        _forget(block.attention_norm)
        self._write(attention.output)
        if self._config.qkv_clip is None:  # a clamp would not turn with the values
            self._rotate_values(attention.qkv, attention.output)
        ffn = block.ffn
        if isinstance(ffn, DenseFFN):
            self._read(ffn.gate_up, block.ffn_norm.weight)
            self._write(ffn.down)
        else:
            experts, norm = ffn.experts, block.ffn_norm.weight
            assert isinstance(experts.gate_up, DenseWeight)
            assert isinstance(experts.down, DenseWeight)
            for reader in (experts.gate_up.weight, ffn.router.weight):
                reader.data = self._stream.rows(reader, norm)
            experts.down.weight.data = self._stream.columns(experts.down.weight)
            if ffn.shared is not None:
                self._read(ffn.shared.gate_up, norm)
                self._write(ffn.shared.down)
        _forget(block.ffn_norm)

    def _read(self, linear: Linear, norm_D: Tensor) -> None:
        """A map that reads the normed stream: the norm's weight and the rotation become its own."""
        weight = _dense(linear)
        weight.weight.data = self._stream.rows(weight.weight, norm_D)

    def _write(self, linear: Linear) -> None:
        """A map whose output is added to the stream."""
        weight = _dense(linear)
        weight.weight.data = self._stream.columns(weight.weight)
        if linear.bias is not None:
            linear.bias.data = self._stream.rows(linear.bias)

    def _rotate_values(self, qkv: Linear, output: Linear) -> None:
        config, turn = self._config, self._head_CC
        first = (config.query_heads + config.kv_heads) * config.head_width
        for rows in (_dense(qkv).weight.data, None if qkv.bias is None else qkv.bias.data):
            if rows is not None:
                values = rows[first:].view(config.kv_heads, config.head_width, -1)
                rows[first:] = (turn.T @ values).view(rows[first:].shape)
        weight = _dense(output)
        per_head = weight.weight.view(config.width, config.query_heads, config.head_width)
        weight.weight.data = (per_head @ turn).flatten(1)


def _dense(linear: Linear) -> DenseWeight:
    assert isinstance(linear.weight, DenseWeight)
    return linear.weight


def _forget(norm: RMSNorm) -> None:
    """A norm whose weight has been folded into what follows it."""
    norm.weight.data = torch.ones_like(norm.weight)

"""The layers that every family is built from: linear maps, norms, rotation, attention, FFNs.

A layer says what is computed. How attention and experts are computed belongs to `Quadrants`, which
a model's caller hands in: the serving step, or a training step.

Shapes: T tokens, D model width, H query heads, G KV heads, C head width, F FFN width, E experts,
K experts per token.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.config import ModelConfig, RopeConfig
from fourfold.models.router import Router
from fourfold.quadrants.experts import ExpertWeights, Routing, swiglu
from fourfold.quantize.weights import DenseWeight, Weight


class Quadrants(Protocol):
    """How the rows of one step are computed."""

    def attention(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Causal attention of each row over its own sequence; [T, H, C]."""
        ...

    def experts(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        """The routed FFN of all rows; [T, D]."""
        ...


class Linear(nn.Module):
    """`x @ weight.T + bias` with a weight [O, I] in any precision."""

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = DenseWeight(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = self.weight.product(self.weight.encode(x_TI))
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return y_TO.to(x_TI.dtype)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope:
    """Angles of the rotary embedding for the positions of one step.

    Halves are rotated against each other: `x * cos + roll(x) * sin`, the sine negated in the first
    half. `cos` and `sin` are [T, 1, C].
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos = cos
        self._sin = sin

    @classmethod
    def at(cls, positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rope:
        """Angles of `positions_T` for inverse `frequencies` [C / 2], rounded to `dtype`."""
        angle_TC = positions_T[:, None].float() * frequencies[None]
        cos, sin = angle_TC.cos(), angle_TC.sin()
        return cls(
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )

    def rotate(self, x_THC: Tensor) -> Tensor:
        """The heads turned by their tokens' angles."""
        half = x_THC.shape[-1] // 2
        return torch.addcmul(x_THC * self._cos, x_THC.roll(half, -1), self._sin)


def rope_frequencies(config: RopeConfig, head_width: int) -> Tensor:
    """Inverse frequencies [C / 2] in radians per position, float32."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    frequencies = 1.0 / config.theta**exponent
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "default":
        return frequencies
    wavelength = 2 * math.pi / frequencies
    context = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / config.factor)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        queries = config.query_heads * config.head_width
        keys = config.kv_heads * config.head_width
        self.widths = [queries, keys, keys]
        self.qkv = Linear(config.width, sum(self.widths), bias=config.qkv_bias)
        self.output = Linear(queries, config.width, bias=config.output_bias)
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(config.head_width, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width, config.norm_eps)
        elif config.qk_norm == "all_heads":
            self.q_norm = RMSNorm(queries, config.norm_eps)
            self.k_norm = RMSNorm(keys, config.norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, layer: int, quadrants: Quadrants) -> Tensor:
        config = self.config
        qkv = self.qkv(x_TD)
        if config.qk_norm == "none" and config.qkv_clip is None:
            heads = [config.query_heads, config.kv_heads]
            qkv = torch.unflatten(qkv, -1, (-1, config.head_width))
            qk, v = torch.split(qkv, [sum(heads), config.kv_heads], dim=1)
            q, k = torch.split(rope.rotate(qk), heads, dim=1)
            return self._attend(q, k, v, layer, quadrants)
        q, k, v = torch.split(qkv, self.widths, dim=-1)
        if config.qk_norm == "all_heads":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.qkv_clip is not None:
            q, k, v = (part.clamp(-config.qkv_clip, config.qkv_clip) for part in (q, k, v))
        shape = (-1, config.head_width)
        q, k, v = (torch.unflatten(part, -1, shape) for part in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return self._attend(rope.rotate(q), rope.rotate(k), v, layer, quadrants)

    def _attend(
        self, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, layer: int, quadrants: Quadrants
    ) -> Tensor:
        out_THC = quadrants.attention(layer, q_THC, k_TGC, v_TGC)
        out_TD: Tensor = self.output(out_THC.flatten(1))
        return out_TD


class DenseFFN(nn.Module):
    """A gated FFN every token passes."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * ffn_width)
        self.down = Linear(ffn_width, width)

    def forward(self, x_TD: Tensor, quadrants: Quadrants) -> Tensor:
        out_TD: Tensor = self.down(swiglu(self.gate_up(x_TD)))
        return out_TD


class SparseFFN(nn.Module):
    """A router, its experts, and the dense FFN beside them where the model has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = Router(moe, config.width)
        shape = (moe.experts, 2 * moe.expert_width, config.width)
        self.experts = ExpertWeights(
            DenseWeight(torch.empty(shape)),
            DenseWeight(torch.empty(moe.experts, config.width, moe.expert_width)),
            slots=moe.experts,
        )
        self.shared = DenseFFN(config.width, moe.shared_width) if moe.shared_width else None

    def forward(self, x_TD: Tensor, quadrants: Quadrants) -> Tensor:
        out_TD = quadrants.experts(x_TD, self.router(x_TD), self.experts)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD, quadrants)
        return out_TD

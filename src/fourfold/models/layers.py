"""The layers that every family is built from: linear maps, norms, rotation, attention, FFNs.

A layer says what is computed. How attention and experts are computed belongs to `Quadrants`, which
a model's caller hands in: the serving step, or a training step.

Shapes: T tokens, D model width, H query heads, G KV heads, C head width, F FFN width, E experts,
K experts per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.rope import rope_angles
from fourfold.kernels.rows import rms_norm_quantize
from fourfold.models.config import ModelConfig, RopeConfig
from fourfold.models.router import Router
from fourfold.quadrants.experts import Delta, ExpertWeights, Routed, Routing, combined, swiglu
from fourfold.quadrants.projection import Projected
from fourfold.quantize.weights import (
    Activations,
    CudaW4A8Weight,
    DenseWeight,
    W8A8Weight,
    Weight,
)


class Quadrants(Protocol):
    """How the rows of one step are computed. `live_T` is 0 for those that only pad it (None: no
    row does)."""

    live_T: Tensor | None

    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        """Causal attention of each row over its own sequence, [T, H C], for a weight that reads
        it."""
        ...

    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Delta:
        """The routed FFN of all rows; [T, D], perhaps still to be combined."""
        ...


class Linear(nn.Module):
    """`x @ weight.T + bias` with a weight [O, I] in any precision."""

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = DenseWeight(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Activations) -> Tensor:
        y_TO = self.weight.product(x.encoded_for(self.weight))
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return y_TO.to(x.dtype)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add_and_norm(
        self, stream_TD: Tensor, delta: Delta | None, reader: Weight, *, keep: bool
    ) -> tuple[Activations, Tensor]:
        """The normed sum of stream and delta for a weight that reads it, and the sum itself.

        Where the reader takes 8-bit rows on a GPU, combining, sum, norm and quantisation are one
        pass, and the rows stay in floating point too only if that is asked for.
        """
        if isinstance(reader, DenseWeight | W8A8Weight):
            stream_TD = stream_TD if delta is None else stream_TD + combined(delta)
            return Activations(self(stream_TD)), stream_TD
        dtype, width = reader.activations
        x, residual_TD = (stream_TD, None) if delta is None else (delta, stream_TD)
        parts, gates_TK, live_T = x if isinstance(x, Routed) else (x, None, None)
        normed_TD, rows, stream_TD = rms_norm_quantize(
            parts,
            self.weight,
            self.eps,
            dtype,
            width,
            residual_TD=residual_TD,
            keep_normed=keep,
            gates_TK=gates_TK,
            live_T=live_T,
        )
        return Activations(normed_TD, tuple(rows), stream_TD.dtype), stream_TD


class Rope(NamedTuple):
    """Angles of the rotary embedding for the positions of one step, [T, C] each.

    Halves are rotated against each other: `x * cos + roll(x) * sin`, the sine negated in the first
    half.
    """

    cos_TC: Tensor
    sin_TC: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rope:
        """Angles of `positions_T` for inverse `frequencies` [C / 2], rounded to `dtype`."""
        return cls(*rope_angles(positions_T, frequencies, dtype))


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
    """Grouped-query attention with rotary positions; queries, keys and values in one product.

    `k_offset_GC`, where calibration made one, is subtracted from the rotated keys: softmax does not
    notice, and 8-bit pages keep channels with a bias more precisely.
    """

    k_offset_GC: Tensor | None

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
        self.register_buffer("k_offset_GC", None)

    def forward(self, x: Activations, rope: Rope, layer: int, quadrants: Quadrants) -> Tensor:
        out_TD: Tensor = self.output(self.heads(x, rope, layer, quadrants))
        return out_TD

    def heads(self, x: Activations, rope: Rope, layer: int, quadrants: Quadrants) -> Activations:
        """What the output projection reads, [T, H C]."""
        config = self.config
        qkv_TA = self.qkv(x)
        if config.qk_norm == "all_heads":
            q, k, v = torch.split(qkv_TA, self.widths, dim=-1)
            qkv_TA = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)
        if config.qkv_clip is not None:
            qkv_TA = qkv_TA.clamp(-config.qkv_clip, config.qkv_clip)
        per_head = config.qk_norm == "head"
        projected = Projected(
            qkv_TA,
            config.query_heads,
            config.kv_heads,
            config.head_width,
            *rope,
            self.q_norm.weight if per_head else None,
            self.k_norm.weight if per_head else None,
            config.norm_eps,
            self.k_offset_GC,
        )
        return quadrants.attention(layer, projected, self.output.weight)


class DenseFFN(nn.Module):
    """A gated FFN every token passes."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * ffn_width)
        self.down = Linear(ffn_width, width)

    @property
    def reader(self) -> Weight:
        """The weight that reads the FFN's input."""
        return self.gate_up.weight

    def forward(self, x: Activations, quadrants: Quadrants) -> Tensor:
        gate_up, reader = self.gate_up(x), self.down.weight
        if isinstance(reader, DenseWeight | W8A8Weight):
            hidden = Activations(swiglu(gate_up))
        else:
            hidden = Activations(None, reader.encode(gate_up, swiglu=True), gate_up.dtype)
        out_TD: Tensor = self.down(hidden)
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

    @property
    def reader(self) -> Weight:
        """The weight that reads the FFN's input."""
        return self.experts.gate_up

    def forward(self, x: Activations, quadrants: Quadrants) -> Delta:
        out = quadrants.experts(x, self._routing(x.kept, quadrants.live_T), self.experts)
        if self.shared is None:
            return out
        shared_TD: Tensor = self.shared(x, quadrants)
        return combined(out) + shared_TD

    def _routing(self, x_TD: Tensor, live_T: Tensor | None) -> Routing:
        """The choice of experts; where their product wants rows sorted by expert, sorted."""
        router, experts = self.router, self.experts
        # Not what stands in for a router to record or to follow a choice.
        plain = isinstance(router, Router)
        if plain and isinstance(experts.gate_up, CudaW4A8Weight) and experts.slot_E is None:
            return router.grouped(x_TD, live_T)
        routing: Routing = router(x_TD)
        return routing

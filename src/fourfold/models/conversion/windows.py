"""Pieces of text running through a model one layer at a time.

Only one layer's weights are needed at a time, and what is kept of the text between layers is its
residual stream. Attention and experts are computed plainly: a conversion must run on any device and
show the inputs of every product.

Shapes: N windows of L tokens, T = N * L rows, D model width, H query heads, G KV heads, C head
width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.models.decoder import Block, Decoder
from fourfold.models.layers import Rope
from fourfold.quadrants.experts import ExpertWeights, Routing, swiglu
from fourfold.quadrants.projection import Projected
from fourfold.quantize.key_offsets import KeyMean
from fourfold.quantize.weights import Activations, DenseWeight, Weight

_WINDOWS_AT_ONCE = 8


class WindowStep:
    """The quadrants of whole windows, each attending to itself alone; `keys` hears of all keys."""

    live_T: Tensor | None = None

    def __init__(self, length: int) -> None:
        self._length = length
        self.keys = KeyMean()

    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        q_THC, k_TGC, v_TGC = projected.rotated()
        self.keys.add(k_TGC)
        q, k, v = (
            torch.unflatten(part, 0, (-1, self._length)).transpose(1, 2)
            for part in (q_THC, k_TGC, v_TGC)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return Activations(out.transpose(1, 2).flatten(0, 1).flatten(1))

    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Tensor:
        assert isinstance(weights.gate_up, DenseWeight)
        assert isinstance(weights.down, DenseWeight)
        rows = weights.gate_up.encode(x.kept)
        out_TD = torch.zeros_like(x.kept)
        for slot in range(weights.slots):
            token, place = (routing.experts_TK == slot).nonzero(as_tuple=True)
            hidden = swiglu(weights.gate_up.product(tuple(part[token] for part in rows), slot))
            y = weights.down.product(weights.down.encode(hidden), slot)
            out_TD.index_add_(0, token, y * routing.gates_TK[token, place, None])
        return out_TD


class Stream:
    """The residual stream of some windows before the next layer, float32 `x_TD`."""

    def __init__(self, model: Decoder, tokens_NL: Tensor) -> None:
        self.windows, self.length = tokens_NL.shape
        self._frequencies = model.frequencies.to(model.embedding.weight.device)
        self.x_TD = F.embedding(
            tokens_NL.flatten().to(model.embedding.weight.device), model.embedding.weight
        ).float()

    def chunks(self) -> Iterator[tuple[slice, Rope]]:
        """A few windows at a time: their rows, and their angles."""
        step = _WINDOWS_AT_ONCE * self.length
        for start in range(0, self.windows * self.length, step):
            rows = slice(start, min(start + step, self.windows * self.length))
            positions_T = torch.arange(rows.stop - start, device=self.x_TD.device) % self.length
            yield rows, Rope.at(positions_T, self._frequencies, torch.float32)

    def advance(self, block: Block) -> None:
        """Through one layer, in place."""
        for rows, rope in self.chunks():
            x, delta = block(self.x_TD[rows], None, rope, WindowStep(self.length))
            self.x_TD[rows] = x + delta

    def perplexity(self, model: Decoder, tokens_NL: Tensor) -> float:
        """Of the windows' own tokens, each predicted from those before it, after the last layer;
        infinite where a float does not hold it."""
        lost = 0.0
        targets_NL = tokens_NL.to(self.x_TD.device)
        for x_LD, window_L in zip(self.x_TD.view(*tokens_NL.shape, -1), targets_NL, strict=True):
            logits = model.logits(model.norm(x_LD[:-1]))
            lost += float(F.cross_entropy(logits, window_L[1:], reduction="sum"))
        mean = lost / (self.windows * (self.length - 1))
        return float(torch.tensor(mean, dtype=torch.float64).exp())

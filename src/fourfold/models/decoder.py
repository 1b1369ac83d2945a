"""The one decoder-only transformer that all families are.

Shapes: T tokens of a step, D model width, S rows whose next token is wanted, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.config import ModelConfig
from fourfold.models.layers import (
    Attention,
    DenseFFN,
    Linear,
    Quadrants,
    RMSNorm,
    Rope,
    SparseFFN,
    rope_frequencies,
)


class Block(nn.Module):
    """Attention, then FFN, each on a normed residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn: DenseFFN | SparseFFN = (
            SparseFFN(config)
            if config.is_sparse(layer)
            else DenseFFN(config.width, config.ffn_width)
        )

    def forward(self, x_TD: Tensor, rope: Rope, quadrants: Quadrants) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rope, self.layer, quadrants)
        out_TD: Tensor = x_TD + self.ffn(self.ffn_norm(x_TD), quadrants)
        return out_TD


class Decoder(nn.Module):
    """Token ids to hidden states (`forward`), hidden states to logits (`logits`).

    Build it under `torch.device("meta")`; `models.loading` gives it its weights.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocabulary)
        with torch.device("cpu"):
            frequencies = rope_frequencies(config.rope, config.head_width)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return cast(list[Block], list(self.layers))

    def forward(self, tokens_T: Tensor, positions_T: Tensor, quadrants: Quadrants) -> Tensor:
        """Normed hidden states [T, D] of the rows of one step."""
        x_TD = F.embedding(tokens_T, self.embedding.weight)
        rope = Rope.at(positions_T, self.frequencies, x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, rope, quadrants)
        hidden_TD: Tensor = self.norm(x_TD)
        return hidden_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Float32 logits [S, V] of chosen rows."""
        logits_SV: Tensor = self.head(hidden_SD)
        return logits_SV.float()

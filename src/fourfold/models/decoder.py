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
from fourfold.models.precision import Precision
from fourfold.quadrants.experts import Delta
from fourfold.quantize.weights import Activations


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

    def forward(
        self, stream_TD: Tensor, delta: Delta | None, rope: Rope, quadrants: Quadrants
    ) -> tuple[Tensor, Delta]:
        """The residual stream after this layer, but for the last addition: (stream, delta). It is
        left to the next norm, which reads both anyway."""
        attention, ffn = self.attention, self.ffn
        x, stream_TD = self.attention_norm.add_and_norm(
            stream_TD, delta, attention.qkv.weight, keep=False
        )
        delta = attention(x, rope, self.layer, quadrants)
        x, stream_TD = self.ffn_norm.add_and_norm(
            stream_TD, delta, ffn.reader, keep=isinstance(ffn, SparseFFN)
        )
        return stream_TD, ffn(x, quadrants)


class Decoder(nn.Module):
    """Token ids to hidden states (`forward`), hidden states to logits (`logits`).

    Build it under `torch.device("meta")`; `models.loading` gives it its weights.
    """

    frequencies: Tensor
    precision: Precision = Precision.FLOAT32
    """What it was loaded in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn: that imports torch's compiler, for seconds.
        embedding = torch.empty(config.vocabulary, config.width)
        self.embedding = nn.Embedding.from_pretrained(embedding)  # type: ignore[no-untyped-call]
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
        """Activations hidden states [T, D] of the rows of one step."""
        stream_TD = F.embedding(tokens_T, self.embedding.weight)
        rope = Rope.at(positions_T, self.frequencies, stream_TD.dtype)
        delta: Delta | None = None
        for block in self.blocks:
            stream_TD, delta = block(stream_TD, delta, rope, quadrants)
        hidden, _ = self.norm.add_and_norm(stream_TD, delta, self.head.weight, keep=True)
        return hidden.kept

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits [S, V] of chosen rows, in the dtype of the head's products."""
        logits_SV: Tensor = self.head(Activations(hidden_SD))
        return logits_SV

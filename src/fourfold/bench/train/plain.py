"""The same decoder as anybody would write it with torch's modules: what a step is measured beside.

Weights are float32, computed under autocast to bfloat16 on a GPU; experts are grouped products over
sorted rows; logits exist whole.

Shapes: B rows, L tokens of a row, T = B L, H query heads, G KV heads, C head width, D model width,
F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.config import ModelConfig
from fourfold.models.layers import rope_frequencies

_DEVIATION = 0.02


class PlainDecoder(nn.Module):
    """Tokens [B, L] to logits [B, L, V]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        frequencies = rope_frequencies(config.rope, config.head_width)
        self.register_buffer("frequencies", frequencies, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_DEVIATION)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x = self.embedding(tokens_BL)
        place_L = torch.arange(tokens_BL.shape[1], device=x.device, dtype=torch.float32)
        angle_LC = torch.outer(place_L, self.get_buffer("frequencies")).repeat(1, 2)
        cos, sin = angle_LC.cos(), angle_LC.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = _Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, config.norm_eps)
        sparse = config.is_sparse(layer)
        self.ffn = _Experts(config) if sparse else _Dense(config.width, config.ffn_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = (
            config.query_heads,
            config.kv_heads,
            config.head_width,
        )
        queries, keys = self.heads * self.width, self.kv_heads * self.width
        self.qkv = nn.Linear(config.width, queries + 2 * keys, bias=False)
        self.output = nn.Linear(queries, config.width, bias=False)
        self.q_norm = nn.RMSNorm(self.width, config.norm_eps)
        self.k_norm = nn.RMSNorm(self.width, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = torch.unflatten(self.qkv(x), -1, (-1, self.width)).transpose(1, 2)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q = _rotated(self.q_norm(q), cos, sin).to(v.dtype)
        k = _rotated(self.k_norm(k), cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


class _Dense(nn.Module):
    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class _Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.choices = moe.experts_per_token
        self.router = nn.Linear(config.width, moe.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.expert_width, config.width))
        self.down = nn.Parameter(torch.empty(moe.experts, config.width, moe.expert_width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.router.weight)
        chosen_TK, experts_TK = logits_TE.topk(self.choices)
        gates_TK = chosen_TK.softmax(-1)
        expert_R, order_R = experts_TK.flatten().sort(stable=True)
        every = torch.arange(len(self.gate_up), device=x_TD.device)
        ends_E = torch.searchsorted(expert_R, every, right=True).int()
        dtype = torch.bfloat16 if x_TD.is_cuda else x_TD.dtype
        token_R = order_R // self.choices
        rows = x_TD.to(dtype)[token_R]
        gate, up = F.grouped_mm(rows, self.gate_up.to(dtype).mT, offs=ends_E).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down.to(dtype).mT, offs=ends_E)
        rows = rows * gates_TK.flatten()[order_R, None].to(dtype)
        out_TD = torch.zeros_like(x_TD).index_add(0, token_R, rows.to(x_TD.dtype))
        return out_TD.view(x_BLD.shape)

"""Turns a dense model into a sparse one that answers the same.

Every FFN becomes experts that all share its storage, behind a random router whose gates sum to
one: whatever the router chooses, the weighted sum is the dense FFN's output. What goes wrong in
routing, permuting or combining therefore shows as a different answer, which makes the upcycled
model an oracle for everything that touches routing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fourfold.models.config import ModelConfig, MoEConfig
from fourfold.models.decoder import Decoder
from fourfold.models.layers import DenseFFN, SparseFFN
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import CudaW8A8Weight

EXPERTS = 8
EXPERTS_PER_TOKEN = 2


def upcycled_config(config: ModelConfig) -> ModelConfig:
    """The configuration of a dense model after `upcycle`."""
    moe = MoEConfig(
        experts=EXPERTS, experts_per_token=EXPERTS_PER_TOKEN, expert_width=config.ffn_width
    )
    return dataclasses.replace(config, moe=moe)


def upcycle(model: Decoder) -> None:
    """Replaces every dense FFN in place; no weight is copied. Routers are the same every time."""
    model.config = config = upcycled_config(model.config)
    device = model.embedding.weight.device
    for layer, block in enumerate(model.blocks):
        dense = block.ffn
        assert isinstance(dense, DenseFFN)
        gate_up, down = dense.gate_up.weight, dense.down.weight
        assert not isinstance(gate_up, CudaW8A8Weight)
        assert not isinstance(down, CudaW8A8Weight)
        with torch.device("meta"):
            sparse = SparseFFN(config)
        generator = torch.Generator().manual_seed(layer)
        router = torch.randn(EXPERTS, config.width, generator=generator)
        sparse.router.weight = nn.Parameter(router.to(device), requires_grad=False)
        sparse.experts = ExpertWeights(
            gate_up.stacked(),
            down.stacked(),
            slots=1,
            slot_E=torch.zeros(EXPERTS, dtype=torch.int64, device=device),
        )
        block.ffn = sparse

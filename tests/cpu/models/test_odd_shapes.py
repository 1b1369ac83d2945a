"""Widths and counts that no large model has, beside transformers' own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.cpu.driving import load_tiny
from tests.cpu.models.computing import PROMPT, logits
from tests.cpu.tiny import COMMON

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "narrow heads": ("Llama", {"head_dim": 6, "attention_bias": True}),
    "one KV head": ("Qwen3", {"head_dim": 20, "num_key_value_heads": 1, "attention_bias": True}),
    "one expert": (
        "Qwen3Moe",
        {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 17},
    ),
    "every expert": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 5,
            "moe_intermediate_size": 17,
            "decoder_sparse_step": 2,
        },
    ),
    "odd widths": (
        "Olmoe",
        {
            "hidden_size": 36,
            "head_dim": 18,
            "num_attention_heads": 2,
            "intermediate_size": 13,
            "num_experts": 5,
            "num_experts_per_tok": 3,
        },
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_are_computed(name: str, tmp_path: Path) -> None:
    prefix, fields = SHAPES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **fields})
    torch.manual_seed(3)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    if prefix.endswith("oe"):
        model.set_experts_implementation("eager")  # its grouped product takes no odd widths
    with torch.inference_mode():
        wanted = model.eval()(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(load_tiny(tmp_path), PROMPT), wanted, rtol=1e-4, atol=1e-4)

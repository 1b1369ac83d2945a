"""Tiny random checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2}

# name -> (transformers' class prefix, config fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias-rope3": ("Llama", {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": (
        "Qwen3Moe",
        MOE
        | {
            "num_experts": 8,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "head_dim": 32,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("Mixtral", MOE | {"num_local_experts": 4}),
    "glm4-moe": (
        "Glm4Moe",
        MOE
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "moe_intermediate_size": 48,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "partial_rotary_factor": 1.0,
            "head_dim": 32,
        },
    ),
    "olmoe": ("Olmoe", MOE | {"num_experts": 8, "clip_qkv": 2.0, "norm_topk_prob": False}),
}

# The same with heads as wide as the kernels want them.
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-wide": (
        "Llama",
        {"initializer_range": 0.08, "hidden_size": 128, "head_dim": 64, "intermediate_size": 208},
    ),
    "qwen3-moe-wide": (
        "Qwen3Moe",
        MOE
        | {
            "num_experts": 8,
            "initializer_range": 0.08,
            "hidden_size": 192,
            "moe_intermediate_size": 112,
            "norm_topk_prob": True,
            "head_dim": 128,
        },
    ),
}


def save_checkpoint(name: str, path: Path) -> Path:
    """Writes a tiny checkpoint of a family; the same weights every time."""
    prefix, fields = (FAMILIES | WIDE)[name]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **fields})
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():  # norms of exactly one would hide a norm left out
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():  # and selection biases of zero a bias
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, -0.2, 0.2)
    model.save_pretrained(path)
    return path


def load_reference(path: Path) -> transformers.PreTrainedModel:
    """transformers' own model of a checkpoint, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

"""A trained model as a Hugging Face directory that transformers loads and `fourfold serve` serves.

Every tensor goes to the name that the family's placements read it from, so loading is the inverse
by construction; the configuration is read back and must be the one that was trained. Where a family
has no factor of its gates, that goes into the experts' last weights, which is the same function.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.models.config import ModelConfig
from fourfold.models.families.family import Placement
from fourfold.models.families.registry import find_family
from fourfold.models.loading import read_model_config

_FILE_BYTES = 4 << 30
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def export(
    weights: dict[str, Tensor],
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Path | None = None,
) -> None:
    """Writes config.json, safetensors files with their index, and the tokenizer's files.

    `weights` are whole, by our names; routers stay float32.
    """
    fields = config_fields(config, dtype)
    family, read = read_model_config(fields, str(folder))
    scale = 1.0
    if config.moe is not None and read.moe is not None:
        scale = config.moe.scale / read.moe.scale
        config = dataclasses.replace(
            config, moe=dataclasses.replace(config.moe, scale=read.moe.scale)
        )
    assert read == config, (read, config)
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "config.json"
    description.write_text(json.dumps(fields, indent=1))
    index: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    files: list[dict[str, Tensor]] = [part]
    size = 0
    for name, place in family.place(config).items():
        kept = torch.float32 if ".router." in place.parameter else dtype
        tensor = _taken(weights, place)
        if scale != 1.0 and place.parameter.endswith(".experts.down"):
            tensor = tensor * scale
        tensor = tensor.to(kept)
        if size + tensor.nbytes > _FILE_BYTES and part:
            part, size = {}, 0
            files.append(part)
        part[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # Some versions of safetensors leave what only its owner can read.
        shutil.copymode(description, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    )
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder)


def _taken(weights: dict[str, Tensor], place: Placement) -> Tensor:
    tensor = weights[place.parameter]
    if place.expert is not None:
        tensor = tensor[place.expert]
    return tensor[place.start : place.start + place.shape[0]]


def _copy_tokenizer(source: Path, folder: Path) -> None:
    files = [path for path in source.iterdir() if path.suffix in (".json", ".jinja", ".model")]
    for path in files:
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def config_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model that training makes."""
    family = find_family(config.family, "the trained model")
    eos = config.eos_token_ids
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": _DTYPES[dtype],
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
    moe = config.moe
    if moe is None:
        return fields
    fields |= {
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "norm_topk_prob": moe.normalise,
    }
    if config.family == "qwen3_moe":
        return fields | {
            "num_experts": moe.experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(config.dense_layers),
        }
    return fields | {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_width // moe.expert_width,
        "first_k_dense_replace": len(config.dense_layers),
        "routed_scaling_factor": moe.scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }

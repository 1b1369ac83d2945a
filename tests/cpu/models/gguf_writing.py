"""Writes tiny checkpoints as GGUF files, the way llama.cpp's converter does it.

Names come from the `gguf` package's own tables, and the rows of queries and keys are reordered for
ggml's rotary kernel in files of architecture `llama`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
}
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight"
)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(checkpoint: Path, path: Path, kind: Kind = Kind.F32, **extra: Any) -> Path:
    """`extra` are further calls on the writer, by name, with their argument."""
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_fields(writer, config)
    for name, argument in extra.items():
        getattr(writer, name)(*(argument if isinstance(argument, tuple) else (argument,)))
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for theirs, values in _stacked(load_file(checkpoint / "model.safetensors")).items():
        if architecture is gguf.MODEL_ARCH.LLAMA and ".q_proj." in theirs:
            values = permute(values, config["num_attention_heads"])
        if architecture is gguf.MODEL_ARCH.LLAMA and ".k_proj." in theirs:
            values = permute(values, config["num_key_value_heads"])
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        _write_tensor(writer, name, values, stored_as(theirs, values, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dequantised(checkpoint: Path, path: Path, kind: Kind) -> Path:
    """The checkpoint whose weights are those that a GGUF file of this kind holds."""
    path.mkdir()
    (path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        how = stored_as(name, values, kind)
        if how is not Kind.F32:
            values = gguf.dequantize(gguf.quantize(values, how), how)
        tensors[name] = torch.from_numpy(np.array(values, np.float32))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def stored_as(name: str, values: np.ndarray, kind: Kind) -> Kind:
    """Norms, biases and routers stay float32 in every file."""
    small = values.ndim == 1 or name.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight"))
    return Kind.F32 if small else kind


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    data = np.ascontiguousarray(values, np.float32)
    if kind is Kind.F32:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors as the converter names them, the experts of a layer in one."""
    whole: dict[str, np.ndarray] = {}
    experts: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, expert, part = match.groups()
            experts[layer, part][int(expert)] = tensor.float().numpy()
        else:
            whole[name] = tensor.float().numpy()
    for (layer, part), values in experts.items():
        mixtral = part in ("w1", "w2", "w3")
        prefix = f"layers.{layer}.feed_forward" if mixtral else f"model.layers.{layer}.mlp"
        stack = np.stack([values[index] for index in range(len(values))])
        whole[f"{prefix}.experts.{part}.weight"] = stack
    return whole


def _write_fields(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_width = config.get("head_dim") or width // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head_width)
    writer.add_eos_token_id(2)
    if config["model_type"] in ("llama", "mixtral"):
        writer.add_vocab_size(config["vocab_size"])
    if config["model_type"].startswith("qwen3"):
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if narrow := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(narrow)

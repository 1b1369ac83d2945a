"""A GGUF file, presented as if it were a Hugging Face directory.

Metadata becomes config.json's fields and tensor names become Hugging Face's, so that families need
to know one spelling only. Two things differ from a directory: tensors may be stored in ggml's
blocks (dequantised here), and Llama-like files hold query and key rows in the order of ggml's
rotary kernel, which is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.gguf_metadata import read_gguf, read_value
from fourfold.models.checkpoint.streaming import StreamingReader

_MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "olmoe": "olmoe"}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.clamp_kqv": "clip_qkv",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_IMPLIED = {"attention.value_length", "rope.dimension_count", "rope.scaling.type"}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERT_NAMES = {
    "ffn_gate_exps": ("mlp.experts.{}.gate_proj", "block_sparse_moe.experts.{}.w1"),
    "ffn_up_exps": ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3"),
    "ffn_down_exps": ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2"),
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_DERIVED = {"rope_freqs.weight"}


class GGUFCheckpoint:
    """One GGUF file of an architecture whose family we compute."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._reader = read_gguf(path)
        parts = int(read_value(self._reader, "split.count") or 1)
        if parts > 1:
            raise CheckpointError(
                f"{path} is one of {parts} parts of a model; join them with "
                "`llama-gguf-split --merge` and give the file that it writes"
            )
        architecture = read_value(self._reader, "general.architecture")
        if architecture not in _MODEL_TYPES:
            raise CheckpointError(
                f"{path}: GGUF architecture {architecture!r} is not supported; "
                f"supported are {', '.join(_MODEL_TYPES)}"
            )
        self._architecture: str = architecture
        self._model_type = _MODEL_TYPES[architecture]
        self._experts = int(read_value(self._reader, f"{architecture}.expert_count") or 0)
        if architecture == "llama" and self._experts:
            self._model_type = "mixtral"
        # Made once: a stack of experts has a name for each, and is asked for by every one of them.
        self._names = {entry.name: self._name(entry) for entry in self._reader.tensors}
        for entry in self._reader.tensors:
            promised = len(self._names[entry.name])
            if _is_stack(entry) and entry.shape[-1] != promised:
                raise CheckpointError(
                    f"{path}: {entry.name} is a stack of {entry.shape[-1]} matrices, not of "
                    f"{promised}; fetch the file again"
                )
        self._tensors = {
            name: entry for entry in self._reader.tensors for name in self._names[entry.name]
        }

    def fields(self) -> Mapping[str, Any]:
        prefix = f"{self._architecture}."
        fields: dict[str, Any] = {"model_type": self._model_type}
        for key in self._reader.fields:
            if not key.startswith(prefix) or key.removeprefix(prefix) in _IMPLIED:
                continue
            value = read_value(self._reader, key)
            fields[_FIELDS.get(key.removeprefix(prefix), key)] = value
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.where} has no token_embd.weight, so it is not a whole language model; "
                "give the file that holds its embeddings"
            )
        fields.setdefault("vocab_size", embedding.shape[1])
        fields["vocab_size"] = int(fields["vocab_size"])
        # Of what is absent ggml's default is meant, whatever a family's is.
        fields.setdefault("rope_theta", 10000.0)
        self._add_rotated(fields)
        fields["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        scaling = read_value(self._reader, f"{prefix}rope.scaling.type")
        if scaling not in (None, "none"):
            fields["rope_scaling"] = {
                "type": scaling,
                "factor": fields.pop(f"{prefix}rope.scaling.factor", None),
            }
        if any(entry.name in _DERIVED for entry in self._reader.tensors):
            raise CheckpointError(
                f"{self.where}: rope_freqs.weight (scaled rotary positions) is not supported in "
                "GGUF; use the original Hugging Face checkpoint"
            )
        if self._model_type == "mixtral":
            fields["num_local_experts"] = fields.pop("num_experts")
        elif self._model_type == "qwen3_moe":
            fields["norm_topk_prob"] = True
        eos = read_value(self._reader, "tokenizer.ggml.eos_token_id")
        if eos is not None:
            fields["eos_token_id"] = int(eos)
        return fields

    def _add_rotated(self, fields: dict[str, Any]) -> None:
        """Says which part of a head is rotated where it is not all, for families to refuse."""
        rotated = read_value(self._reader, f"{self._architecture}.rope.dimension_count")
        width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        head = fields.get("head_dim") or (width // heads if width and heads else None)
        if rotated is not None and head and rotated != head:
            fields["partial_rotary_factor"] = rotated / head

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF lists the fastest axis first; stacked experts are presented one by one.
        return {
            name: tuple(int(n) for n in reversed(entry.shape))[1 if _is_stack(entry) else 0 :]
            for name, entry in self._tensors.items()
        }

    def nbytes(self, name: str) -> int:
        entry = self._tensors[name]
        return int(entry.n_bytes) // len(self._names[entry.name])

    def tensors(
        self, names: set[str], reader: StreamingReader | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        for entry in self._reader.tensors:
            wanted = [(i, name) for i, name in enumerate(self._names[entry.name]) if name in names]
            if not wanted:
                continue
            whole = self._dequantize(entry)
            for index, name in wanted:
                yield name, whole[index] if _is_stack(entry) else whole

    def _name(self, entry: gguf.ReaderTensor) -> list[str]:
        if entry.name in _NAMES:
            return [_NAMES[entry.name]]
        match = _BLOCK.fullmatch(entry.name)
        if match is None:
            return [entry.name]
        layer, block, kind = match.groups()
        sparse = self._model_type == "mixtral"
        if block in _EXPERT_NAMES:
            pattern = f"model.layers.{layer}.{_EXPERT_NAMES[block][sparse]}.{kind}"
            return [pattern.format(expert) for expert in range(self._experts)]
        name = _BLOCK_NAMES.get(block, block)
        if sparse and block == "ffn_gate_inp":
            name = "block_sparse_moe.gate"
        return [f"model.layers.{layer}.{name}.{kind}"]

    def _dequantize(self, entry: gguf.ReaderTensor) -> Tensor:
        try:
            array = gguf.dequantize(entry.data, entry.tensor_type)
            values = torch.from_numpy(np.require(array, requirements="W"))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.where}: {entry.name} is stored as {entry.tensor_type.name}, "
                "which cannot be read; requantise the file, for instance to Q8_0"
            ) from error
        kind = entry.name.split(".")[-2]
        if self._architecture == "llama" and kind in ("attn_q", "attn_k"):
            heads = read_value(self._reader, "llama.attention.head_count")
            if kind == "attn_k":
                heads = read_value(self._reader, "llama.attention.head_count_kv") or heads
            rows = values.shape[0]
            pairs = values.view(heads, rows // heads // 2, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        return values


def _is_stack(entry: gguf.ReaderTensor) -> bool:
    return len(entry.shape) == 3

"""What a decoder-only model is, independent of the family and of the file it came from.

`ModelConfig` is what layers are built from. `ConfigReader` turns a Hugging Face `config.json` into
one and keeps account of every field: one that nobody read, or that asks for something we would not
compute, is an error naming it, because a checkpoint computed almost as written answers wrongly.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal

from fourfold.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the whole head width, halves rotated against each other.

    `linear` divides positions by `factor`; `llama3` divides low frequencies by it and blends in
    between (Llama 3.1 reference code, `apply_scaling`).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A sparse FFN: `experts_per_token` of `experts` experts of width `expert_width` per token.

    `score` turns router logits into scores; `normalise` divides the chosen scores by their sum;
    `selection_bias` adds a learnt bias for choosing only; `scale` multiplies the gates;
    `shared_width` is the width of a dense FFN every token also passes (0: none).
    """

    experts: int
    experts_per_token: int
    expert_width: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    selection_bias: bool = False
    scale: float = 1.0
    shared_width: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.experts:
            raise CheckpointError(
                f"{self.experts_per_token} experts per token of {self.experts} experts cannot be "
                "routed; num_experts_per_tok must be between 1 and the number of experts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with pre-norm RMSNorm, rotary GQA attention and a gated FFN."""

    family: str
    vocabulary: int
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    """Width of a dense FFN; unused in layers that are sparse."""
    max_positions: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """RMSNorm on queries and keys before the rotation: per head, or over all heads at once."""
    qkv_clip: float | None = None
    """Clamp of queries, keys and values to [-clip, clip]."""
    tied_embeddings: bool = False
    moe: MoEConfig | None = None
    dense_layers: frozenset[int] = frozenset()
    """Layers that keep a dense FFN although `moe` is set."""
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise CheckpointError(
                f"{self.query_heads} query heads are not a multiple of {self.kv_heads} KV heads; "
                "num_attention_heads must be divisible by num_key_value_heads"
            )
        if self.head_width % 2:
            raise CheckpointError(f"head width {self.head_width} is odd; rotary needs it even")

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's FFN is a mixture of experts."""
        return self.moe is not None and layer not in self.dense_layers


# Fields of config.json that say how a model was made, trained or stored, not what it computes.
# fmt: off
_DESCRIPTIVE = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
    "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "label2id", "max_window_layers", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "torch_dtype", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})
# fmt: on
_MISSING = object()

# What no model comes near, while a file that is broken or hostile goes far beyond: layers and
# experts are walked through one by one, and widths are allocated.
MOST_LAYERS = 1 << 10
MOST_HEADS = 1 << 12
MOST_HEAD_WIDTH = 1 << 12
MOST_WIDTH = 1 << 20
MOST_EXPERTS = 1 << 13
_MOST_EXPERTS_OF_ALL_LAYERS = 1 << 17
_MOST_VOCABULARY = 1 << 24
_MOST_POSITIONS = 1 << 30
_MOST_TOKEN_ID = (1 << 31) - 1


class ConfigReader:
    """Reads a `config.json` once, field by field, and refuses what is left over.

    Errors are `CheckpointError`s naming the file, the field and its value.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = dict(fields)
        self._where = where
        self._read: set[str] = set()

    def integer(self, name: str, default: Any = _MISSING, *, least: int = 1, most: int) -> int:
        """A count or a size: few of them may be zero, and none is beyond all reason."""
        value = int(self._take(name, (int,), "an integer", default))
        if value < least:
            raise self.error(f"{name} = {value} is less than {least}")
        if value > most:
            raise self.error(f"{name} = {_shortened(value)} is more than {most}")
        return value

    def experts(self, name: str, layers: int) -> int:
        """How many experts a sparse layer has, in a model of so many layers."""
        experts = self.integer(name, most=MOST_EXPERTS)
        if experts * layers > _MOST_EXPERTS_OF_ALL_LAYERS:
            raise self.error(
                f"{name} = {experts} in {layers} layers are {experts * layers} experts, more than "
                f"{_MOST_EXPERTS_OF_ALL_LAYERS}"
            )
        return experts

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A number above zero: JSON of Python's may hold infinities and NaN, too."""
        value = self._take(name, (int, float), "a number", default)
        if not _is_positive(value):
            raise self.error(f"{name} = {_shortened(value)} is not a number above zero")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        return bool(self._take(name, (bool,), "true or false", default))

    def optional(self, name: str) -> Any:
        """The field's value, None where it is absent or null."""
        self._read.add(name)
        return self._fields.get(name)

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def expect(self, name: str, *honoured: Any) -> None:
        """The field must be absent, null, or one of the values that we compute."""
        value = self.optional(name)
        if value is not None and value not in honoured:
            allowed = " or ".join(map(repr, honoured)) if honoured else "null"
            raise self.error(f"{name} = {value!r} is not supported (only {allowed})")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        if isinstance(self.optional(name), list):
            ids = self.integers(name)
        else:
            value = self._take(name, (int,), "a token id or a list of them", None)
            ids = () if value is None else (value,)
        for token in ids:
            if abs(token) > _MOST_TOKEN_ID:
                raise self.error(f"{name} = {_shortened(token)} is more than {_MOST_TOKEN_ID}")
        return ids

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty where the field is absent or null."""
        value = self._take(name, (list,), "a list of integers", [])
        if any(type(entry) is not int for entry in value):
            raise self.error(f"{name} = {value!r} is not a list of integers")
        return tuple(value)

    def finish(self) -> None:
        """Raises if any field is left that was neither read nor is merely descriptive."""
        left = sorted(set(self._fields) - self._read - _DESCRIPTIVE)
        if left:
            shown = ", ".join(f"{name} = {self._fields[name]!r}" for name in left)
            raise self.error(f"fields that this family does not honour: {shown}")

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {problem}")

    def _take(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        self._read.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is _MISSING:
                raise self.error(f"the field {name} is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(f"{name} = {value!r} is not {what}")
        return value


def _is_positive(value: float) -> bool:
    """Whether it is above zero and a float can hold it, which not every integer of JSON is."""
    return 0 < value <= sys.float_info.max


def _shortened(value: float) -> str:
    """A number that may have thousands of digits."""
    digits = str(value)
    return digits if len(digits) <= 40 else f"{digits[:20]}... ({len(digits)} digits)"


def read_rope(reader: ConfigReader, theta_default: float) -> RopeConfig:
    """The rotary settings, in the older (`rope_theta`, `rope_scaling`) or the newer
    (`rope_parameters`) spelling; a `theta_default` is the family's own."""
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = reader.optional(name) or {}
        if not isinstance(value, dict):
            raise reader.error(f"{name} = {value!r} is not an object")
        parameters |= value

    def number(name: str) -> Any:
        value = parameters.pop(name, None)
        if value is not None and type(value) not in (int, float):
            raise reader.error(f"rope {name} = {value!r} is not a number")
        if value is not None and not _is_positive(value):
            raise reader.error(f"rope {name} = {_shortened(value)} is not a number above zero")
        return value

    theta = number("rope_theta")
    theta = float(theta) if theta is not None else reader.number("rope_theta", theta_default)
    reader.expect("rope_theta", theta)
    reader.expect("rope_interleaved", False)
    for rotated in (reader.optional("partial_rotary_factor"), number("partial_rotary_factor")):
        if rotated not in (None, 1.0):
            raise reader.error(f"partial_rotary_factor = {rotated!r} is not supported (only 1.0)")
    kind: Any = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        keywords: dict[str, Any] = {}
    elif kind == "linear":
        keywords = {"factor": number("factor")}
    elif kind == "llama3":
        original = number("original_max_position_embeddings")
        names = ("factor", "low_freq_factor", "high_freq_factor")
        keywords = {name: number(name) for name in names}
        keywords["original_max_positions"] = original
    else:
        raise reader.error(f"rope type {kind!r} is not supported (default, linear or llama3)")
    absent = [name for name, value in keywords.items() if value is None]
    if absent or parameters:
        raise reader.error(f"rope {kind!r}: missing {absent}, not honoured {sorted(parameters)}")
    if kind == "llama3" and keywords["low_freq_factor"] >= keywords["high_freq_factor"]:
        raise reader.error("rope low_freq_factor must be less than high_freq_factor")
    return RopeConfig(theta=theta, kind=kind, **keywords)


def read_vocabulary(reader: ConfigReader) -> int:
    """The number of token ids."""
    return reader.integer("vocab_size", most=_MOST_VOCABULARY)


def read_common(reader: ConfigReader, *, theta_default: float = 10000.0) -> dict[str, Any]:
    """The fields that every family spells alike, as keywords of `ModelConfig`. `theta_default` is
    what the family means by a `rope_theta` that is absent."""
    heads = reader.integer("num_attention_heads", most=MOST_HEADS)
    width = reader.integer("hidden_size", most=MOST_WIDTH)
    reader.expect("hidden_act", "silu")
    reader.expect("mlp_bias", False)
    reader.expect("use_sliding_window", False)
    reader.optional("sliding_window")
    if reader.optional("use_sliding_window") is None:  # false turns off a window that is named
        reader.expect("sliding_window")
    layer_types = reader.optional("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise reader.error(f"layer_types = {layer_types!r} is not supported (only full_attention)")
    reader.expect("quantization_config")
    return {
        "vocabulary": read_vocabulary(reader),
        "layers": reader.integer("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "query_heads": heads,
        "kv_heads": reader.integer("num_key_value_heads", heads, most=MOST_HEADS),
        "head_width": reader.integer("head_dim", width // heads, most=MOST_HEAD_WIDTH),
        "ffn_width": reader.integer("intermediate_size", most=MOST_WIDTH),
        "max_positions": reader.integer("max_position_embeddings", most=_MOST_POSITIONS),
        "norm_eps": reader.number("rms_norm_eps"),
        "rope": read_rope(reader, theta_default),
        "tied_embeddings": reader.flag("tie_word_embeddings", False),
        "eos_token_ids": reader.token_ids("eos_token_id"),
    }

"""The decoder as it is trained: made from a configuration, drawn from a seed, counted.

Weights are drawn by their names, so that a model is the same however it is spread over processes.

Shapes: T tokens, D model width, E experts of this process.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import xxhash
from torch import Tensor, nn

from fourfold.errors import ConfigError
from fourfold.models.config import ModelConfig, MoEConfig, RopeConfig
from fourfold.models.decoder import Decoder
from fourfold.models.footprint import footprint
from fourfold.models.layers import DenseFFN, Quadrants, RMSNorm, SparseFFN
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import Activations, DenseWeight
from fourfold.train.config import ModelSection, RouterSection
from fourfold.train.router import TrainedRouter
from fourfold.train.rows import TrainedNorm, trained_swiglu

_VOCABULARY_STEP = 64


def model_config(
    section: ModelSection, router: RouterSection, vocabulary: int, end_of_text: int | None
) -> ModelConfig:
    """The decoder that a configuration asks for, of a family that can be served.

    `vocabulary` and `end_of_text` are the data's. ConfigError where the section names a smaller
    vocabulary.
    """
    if section.vocabulary is not None and section.vocabulary < vocabulary:
        raise ConfigError(
            f"model.vocabulary = {section.vocabulary} is less than the {vocabulary} ids of the "
            "data; raise it or leave it out"
        )
    sparse, sigmoid = section.form == "sparse", router.score == "sigmoid"
    moe = MoEConfig(
        experts=section.experts,
        experts_per_token=section.experts_per_token,
        expert_width=section.expert_width,
        score=router.score,
        selection_bias=sigmoid,
        scale=router.gate_scale,
        shared_width=section.shared_experts * section.expert_width,
    )
    family = ("glm4_moe" if sigmoid else "qwen3_moe") if sparse else "qwen3"
    return ModelConfig(
        family=family,
        vocabulary=section.vocabulary or -(-vocabulary // _VOCABULARY_STEP) * _VOCABULARY_STEP,
        layers=section.layers,
        width=section.width,
        query_heads=section.heads,
        kv_heads=section.kv_heads,
        head_width=section.head_width,
        ffn_width=section.active_width,
        max_positions=section.max_positions,
        norm_eps=section.norm_eps,
        rope=RopeConfig(theta=section.rope_theta),
        qk_norm="head",
        tied_embeddings=section.tied_embeddings,
        moe=moe if sparse else None,
        dense_layers=frozenset(range(section.dense_layers)) if sparse else frozenset(),
        eos_token_ids=() if end_of_text is None else (end_of_text,),
    )


class TrainedFFN(DenseFFN):
    """A gated FFN whose gate has a gradient in one pass."""

    def forward(self, x: Activations, quadrants: Quadrants) -> Tensor:
        out_TD: Tensor = self.down(Activations(trained_swiglu(self.gate_up(x))))
        return out_TD


def build(
    config: ModelConfig,
    *,
    seed: int,
    deviation: float,
    device: torch.device,
    experts: range | None = None,
) -> Decoder:
    """A decoder with drawn weights, float32, that want gradients.

    `experts` are those that this process holds, by default all.
    """
    with torch.device("meta"):
        model = Decoder(config)
        model.norm = TrainedNorm(config.width, config.norm_eps)
        for block in model.blocks:
            block.attention_norm = TrainedNorm(config.width, config.norm_eps)
            block.ffn_norm = TrainedNorm(config.width, config.norm_eps)
            if isinstance(block.ffn, SparseFFN):
                _make_trainable(block.ffn, config, experts)
            else:
                block.ffn = TrainedFFN(config.width, config.ffn_width)
    if config.tied_embeddings:
        model.head.weight = _tied(model.embedding.weight)
    made: dict[int, nn.Parameter] = {}
    for path, owner in list(model.named_modules()):
        for leaf, empty in list(owner.named_parameters(recurse=False)):
            name = f"{path}.{leaf}"
            if id(empty) not in made:
                data = _draw(name, owner, empty, config, seed, deviation, experts).to(device)
                made[id(empty)] = nn.Parameter(data, requires_grad=leaf != "selection_bias")
            setattr(owner, leaf, made[id(empty)])
    model.frequencies = model.frequencies.to(device)
    return model.train()


def _make_trainable(ffn: SparseFFN, config: ModelConfig, experts: range | None) -> None:
    moe = config.moe
    assert moe is not None
    ffn.router = TrainedRouter(moe, config.width)
    if ffn.shared is not None:
        ffn.shared = TrainedFFN(config.width, moe.shared_width)
    if experts is not None and len(experts) < moe.experts:
        ffn.experts = ExpertWeights(
            DenseWeight(torch.empty(len(experts), 2 * moe.expert_width, config.width)),
            DenseWeight(torch.empty(len(experts), config.width, moe.expert_width)),
            slots=len(experts),
        )


def _tied(weight: nn.Parameter) -> DenseWeight:
    """The head's weight that is the embedding's, as one parameter."""
    head = DenseWeight(weight)
    head.weight = weight
    return head


def _draw(
    name: str,
    owner: nn.Module,
    empty: Tensor,
    config: ModelConfig,
    seed: int,
    deviation: float,
    experts: range | None,
) -> Tensor:
    """A parameter's initial values, float32 on the CPU."""
    if isinstance(owner, RMSNorm):
        return torch.ones(empty.shape)
    if name.endswith(".selection_bias"):
        return torch.zeros(empty.shape)
    if name.endswith((".attention.output.weight.weight", ".down.weight", ".down.weight.weight")):
        deviation /= math.sqrt(2 * config.layers)
    if ".experts." not in name:
        return _normal(name, empty.shape, seed, deviation)
    drawn = [
        _normal(f"{name}.{expert}", empty.shape[1:], seed, deviation)
        for expert in experts or range(len(empty))
    ]
    return torch.stack(drawn)


def _normal(name: str, shape: torch.Size, seed: int, deviation: float) -> Tensor:
    key = xxhash.xxh3_64_intdigest(name.encode(), seed)
    generator = torch.Generator().manual_seed(key)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters, and what a token costs in training: forward and twice that for gradients.

    `flops_per_token` counts every product of the layers and of the head, and causal attention over
    a whole row; looking up embeddings, norms and softmax are not counted. `non_embedding` and
    `active_non_embedding` leave out the embedding and the head.
    """

    total: int
    active: int
    non_embedding: int
    active_non_embedding: int
    flops_per_token: float


def count(config: ModelConfig, length: int) -> Counts:
    """The counts of a model trained on rows of `length` tokens."""
    parts = footprint(config)
    tables = [part for part in parts if part.name.startswith(("embedding", "head"))]
    norms = sum(part.active for part in parts if part.name == "norms")
    total, active = sum(part.total for part in parts), sum(part.active for part in parts)
    non_embedding = total - sum(part.total for part in tables)
    active_non_embedding = active - sum(part.active for part in tables)
    products = active_non_embedding - norms + config.vocabulary * config.width
    if config.moe is not None and config.moe.selection_bias:
        products -= config.moe.experts * sum(map(config.is_sparse, range(config.layers)))
    # Scores and weighted values, each over half of the row on average.
    attention = 2 * config.layers * config.query_heads * config.head_width * (length + 1) / 2
    return Counts(total, active, non_embedding, active_non_embedding, 6 * (products + attention))

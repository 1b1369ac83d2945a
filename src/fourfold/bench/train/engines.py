"""What takes steps in the benchmark: our trainer, plain PyTorch, torchtitan."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.bench.train.config import Peer
from fourfold.bench.train.plain import PlainDecoder
from fourfold.errors import ConfigError
from fourfold.models.config import ModelConfig
from fourfold.train.config import TrainConfig
from fourfold.train.data.batches import Batch
from fourfold.train.loop import Trainer
from fourfold.train.parallel import Parallel

_DIFFERENT_BATCHES = 4


class Engine(Protocol):
    """Takes training steps, one whole global batch each."""

    def step(self) -> None:
        """Launches one step; whoever times it waits for the device."""
        ...


class RandomBatches:
    """Few batches of random tokens, every row one document, again and again."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (_DIFFERENT_BATCHES, rows, length + 1)
        self._tokens = torch.randint(vocabulary, shape, generator=generator)
        self._document = torch.zeros(shape[1:], dtype=torch.int32)

    def batch(self, index: int) -> Batch:
        """See `Batches`."""
        return Batch(self._tokens[index % _DIFFERENT_BATCHES], self._document)


class Ours:
    """`fourfold train` without its loop's records."""

    def __init__(self, config: TrainConfig, model: ModelConfig, device: torch.device) -> None:
        batches = RandomBatches(config.data.rows, config.data.length, model.vocabulary)
        self.trainer = Trainer(config, model, batches, Parallel(0, 1, device))

    def step(self) -> None:
        self.trainer.launch()


class Theirs:
    """A module from tokens [B, L] to logits [B, L, V], trained as is usual: autocast on a GPU,
    AdamW in one kernel, gradients of micro-batches added up."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        vocabulary: int,
        device: torch.device,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._config, self._device = config, device
        self.model = model
        # What torch.compile makes has no truth value.
        self._forward = model if forward is None else forward
        batches = RandomBatches(config.data.rows, config.data.length, vocabulary)
        # There already: a peer is not to wait for copies that a loader would make in time.
        every = range(_DIFFERENT_BATCHES)
        self._tokens = [batches.batch(index).tokens.to(device) for index in every]
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer.rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=device.type == "cuda",
        )
        self._steps = 0

    def step(self) -> None:
        micro = self._config.run.micro_rows or self._config.data.rows
        for tokens in torch.split(self._tokens[self._steps % len(self._tokens)], micro):
            self.loss(tokens).backward()  # type: ignore[no-untyped-call]  # torch gives no type
        nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1

    def loss(self, tokens: Tensor) -> Tensor:
        """Of one micro-batch, as its share of the step's mean."""
        cast = contextlib.nullcontext()
        with torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else cast:
            logits = self._forward(tokens[:, :-1])
        tokens_in_step = self._config.data.rows * self._config.data.length
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
        )
        return loss / tokens_in_step


def check_peer(peer: Peer, model: ModelConfig) -> None:
    """ConfigError where a peer is not installed or has no such model."""
    if model.family == "glm4_moe":
        raise ConfigError(
            f'{peer} has no sigmoid router with shared experts; use router.score = "softmax"'
        )
    if peer != "torchtitan":
        return
    if importlib.util.find_spec("torchtitan") is None:
        raise ConfigError(
            "torchtitan is not installed; `pip install 'torchtitan<0.3'`, or leave it out"
        )
    if model.dense_layers:
        raise ConfigError("torchtitan's Qwen3 has no dense first layers; use model.dense_layers=0")


def make_peer(peer: Peer, config: TrainConfig, model: ModelConfig, device: torch.device) -> Engine:
    """A peer of our trainer. ConfigError where `check_peer` raises one."""
    check_peer(peer, model)
    if peer == "torchtitan":
        return _torchtitan(config, model, device)
    with device:
        plain = PlainDecoder(model)
    forward = torch.compile(plain) if peer == "compiled" else None
    return Theirs(config, plain, model.vocabulary, device, forward)


def _torchtitan(config: TrainConfig, model: ModelConfig, device: torch.device) -> Engine:
    """torchtitan's Qwen3 on one device as its release 0.2 makes and compiles it."""
    from torchtitan.config.job_config import Compile
    from torchtitan.models.llama4.infra.parallelize import apply_compile
    from torchtitan.models.moe import MoEArgs
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs

    arguments: dict[str, Any] = {
        "dim": model.width,
        "n_layers": model.layers,
        "n_heads": model.query_heads,
        "n_kv_heads": model.kv_heads,
        "vocab_size": model.vocabulary,
        "head_dim": model.head_width,
        "hidden_dim": model.ffn_width,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "qk_norm": True,
        "max_seq_len": config.data.length,
        "enable_weight_tying": model.tied_embeddings,
    }
    if (moe := model.moe) is not None:
        arguments |= {
            "moe_enabled": True,
            "moe_inter_dim": moe.expert_width,
            "moe_args": MoEArgs(
                num_experts=moe.experts,
                num_shared_experts=0,
                score_func="softmax",
                route_norm=True,
                score_before_experts=False,
                top_k=moe.experts_per_token,
                load_balance_coeff=None,
            ),
        }
    with device:
        theirs = Qwen3Model(Qwen3ModelArgs(**arguments))
        with torch.no_grad():
            theirs.init_weights(device)
    if device.type == "cuda":
        apply_compile(theirs, Compile(enable=True), ep_enabled=False)
    return Theirs(config, theirs, model.vocabulary, device)

"""A source of tokens, and the smallest runs that learn from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.models.config import ModelConfig
from fourfold.train.config import TrainConfig, make_config
from fourfold.train.data.batches import Batch
from fourfold.train.loop import Trainer
from fourfold.train.losses import Scale
from fourfold.train.model import model_config
from fourfold.train.parallel import Parallel

VOCABULARY = 24
ALONE = Parallel(0, 1, torch.device("cpu"))
WHOLE = Scale(1.0, 1.0)
"""Counts a batch by its sum."""

FIELDS: dict[str, Any] = {
    "model": {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 16,
        "experts": 4,
        "experts_per_token": 2,
        "expert_width": 16,
        "max_positions": 128,
    },
    "data": {"train": "toy", "length": 24, "rows": 8},
    "optimizer": {"rate": 1e-2},
    "schedule": {"steps": 20, "warmup": 2},
    "run": {"device": "cpu", "save_every": 10, "log_every": 1},
}
SIGMOID: dict[str, Any] = {
    "model": {"shared_experts": 1, "dense_layers": 1, "layers": 3},
    "router": {"score": "sigmoid", "balance_loss": 1e-4, "balance_over": "sequence"},
}
DENSE: dict[str, Any] = {"model": {"form": "dense", "tied_embeddings": True}}


class Chain:
    """Documents of a first-order Markov chain: what follows a token is drawn by that token alone.

    A batch is a function of its number, as `Batches` promises.
    """

    def __init__(self, rows: int, length: int, *, seed: int = 0) -> None:
        self._rows, self._length, self._seed = rows, length, seed
        draw = np.random.default_rng(3)
        self._next = draw.dirichlet(np.full(VOCABULARY, 0.15), VOCABULARY)

    def batch(self, index: int) -> Batch:
        draw = np.random.default_rng([self._seed, index])
        shape = (self._rows, self._length + 1)
        tokens, document = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
        begins = draw.random(shape) < 0.05
        begins[:, 0] = False
        sums = self._next.cumsum(1)
        for at in range(self._length + 1):
            fresh = draw.integers(VOCABULARY, size=self._rows)
            if at:
                row = sums[tokens[:, at - 1]]
                follows = (draw.random(self._rows)[:, None] > row).sum(1)
                tokens[:, at] = np.where(begins[:, at], fresh, follows.clip(max=VOCABULARY - 1))
            else:
                tokens[:, 0] = fresh
        document[:] = begins.cumsum(1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(document))

    def best_loss(self, batches: int) -> float:
        """Mean cross-entropy, nats, of whoever knows the chain on the first batches."""
        losses = []
        for index in range(batches):
            batch = self.batch(index)
            tokens, document = batch.tokens.numpy(), batch.document.numpy()
            likely = self._next[tokens[:, :-1], tokens[:, 1:]]
            losses.append(-np.log(likely[document[:, 1:] == document[:, :-1]]))
        return float(np.concatenate(losses).mean())


class Same:
    """One batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, index: int) -> Batch:
        return self._batch


def fields(folder: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """The smallest run, with sections changed."""
    made = copy.deepcopy(FIELDS)
    made["run"]["folder"] = str(folder)
    for change in changes:
        for section, values in change.items():
            made.setdefault(section, {}).update(values)
    return made


def config(folder: Path, *changes: dict[str, Any]) -> TrainConfig:
    return make_config(fields(folder, *changes), "toy")


def decoder_config(config: TrainConfig) -> ModelConfig:
    return model_config(config.model, config.router, VOCABULARY, 0)


def chain(config: TrainConfig, *, seed: int = 0) -> Chain:
    return Chain(config.data.rows, config.data.length, seed=seed)


def trainer(config: TrainConfig, batches: Any = None, parallel: Parallel = ALONE) -> Trainer:
    """A run of the toy source, or of other batches."""
    return Trainer(config, decoder_config(config), batches or chain(config), parallel)

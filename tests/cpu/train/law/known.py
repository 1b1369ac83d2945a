"""Records of a law whose coefficients are known, so that fits have something to find."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fourfold.train.law.records import RunRecord

DENSE = (1, 2, 4, 8, 16, 32, 64)
SPARSE = (2, 4, 8)
RATIOS = (4, 8, 16, 32)
TOKENS = (50_000_000, 100_000_000, 200_000_000)
CENTRE = 4e6


@dataclasses.dataclass(frozen=True)
class Known:
    """L = E + A (N / 4e6)**-a R**-(d + g ln(N / 4e6)) + B (D / 1e8)**-b R**w."""

    e: float = 1.6
    a_term: float = 0.8
    a: float = 0.3
    d: float = 0.12
    g: float = 0.01
    b_term: float = 0.5
    b: float = 0.3
    w: float = 0.0

    def loss(self, active: float, ratio: float, tokens: float) -> float:
        size = math.log(active / CENTRE)
        by_size = math.exp(-self.a * size - math.log(ratio) * (self.d + self.g * size))
        by_tokens = (tokens / 1e8) ** -self.b * ratio**self.w
        return self.e + self.a_term * by_size + self.b_term * by_tokens

    def leverage(self, active: float, ratio: float) -> float:
        """Where w = 0."""
        return float(ratio ** ((self.d + self.g * math.log(active / CENTRE)) / self.a))


def grid(law: Known, *, noise: float = 0.0, seed: int = 0) -> list[RunRecord]:
    """A record of every run of a usual grid. `noise` is relative; half of its variance is shared
    by the runs of a chain."""
    draws = np.random.default_rng(seed)
    cells = [(size, 1) for size in DENSE] + [(s, r) for s in SPARSE for r in RATIOS]
    records = []
    for millions, ratio in cells:
        shared = draws.normal()
        for tokens in TOKENS:
            luck = noise * math.sqrt(0.5) * (shared + draws.normal())
            loss = law.loss(active_of(millions, ratio), ratio, tokens) * math.exp(luck)
            records.append(record(millions, ratio, tokens, loss))
    return records


def active_of(millions: int, ratio: int) -> int:
    """Active parameters: those of the router grow with the experts."""
    return millions * (1_000_000 + (200 * ratio if ratio > 1 else 0))


def record(millions: int, ratio: int, tokens: int, loss: float) -> RunRecord:
    active = active_of(millions, ratio)
    return RunRecord(
        name=f"{millions}M-x{ratio}-{tokens // 1_000_000}M-s0",
        chain=f"{millions}M-x{ratio}-s0",
        model=f"{millions}M",
        ratio=ratio,
        chosen=4,
        seed=0,
        active=active,
        # Half of what a token passes are experts.
        total=active + active * (ratio - 1) // 2,
        tokens=tokens,
        loss=float(loss),
        evaluated_tokens=1_000_000,
        bytes_per_token=3.5,
        flops_per_token=6.0 * (active + 1_000_000),
        layers=8,
        width=64 * millions,
        arguments=("base.toml",),
        config_sha256="",
        hardware="none",
        versions={},
    )

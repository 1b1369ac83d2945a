"""What a router is told beside its logits."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """How logits become gates."""

    choices: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    """Whether a token's gates are divided by their sum."""
    scale: float = 1.0
    """A factor of the gates."""


class Spread(NamedTuple):
    """Rows choose among K neighbouring experts, the first from a hash of row, seed and step: even
    whatever the weights, and repeatable."""

    seed: int
    steps: Tensor
    """int64 scalar: how many calls there were, advanced by each on its device."""

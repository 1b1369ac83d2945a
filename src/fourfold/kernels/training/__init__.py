"""What training computes besides products, forward and backward, in few passes over memory."""

from fourfold.kernels.training.verbs import (
    accumulate,
    adamw,
    add_norm,
    add_norm_backward,
    cross_entropy,
    gated_swiglu,
    gated_swiglu_backward,
    norm_rope_backward,
    sum_rows,
)

__all__ = [
    "accumulate",
    "adamw",
    "add_norm",
    "add_norm_backward",
    "cross_entropy",
    "gated_swiglu",
    "gated_swiglu_backward",
    "norm_rope_backward",
    "sum_rows",
]

"""What training computes besides products, forward and backward, in few passes over memory."""

from fourfold.kernels.training.verbs import (
    cross_entropy,
    gated_swiglu,
    gated_swiglu_backward,
    norm_rope_backward,
    sum_rows,
)

__all__ = [
    "cross_entropy",
    "gated_swiglu",
    "gated_swiglu_backward",
    "norm_rope_backward",
    "sum_rows",
]

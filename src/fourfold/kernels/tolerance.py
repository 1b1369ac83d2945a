"""How far a kernel's result may be from its float reference, by what its recipe rounds.

The measure is ||out - reference|| / ||reference||, where the reference computes in float32 or wider
from the same inputs, weights and pages as their codes stand for. A kernel whose rounding is exact
by construction (integer products, or the same arithmetic as the reference) still shows the rounding
of its activations: about 1/150 of a Gaussian row in INT8, 1/40 in e4m3, more where outliers stretch
the grid, and 1/400 for a bfloat16 output.
"""

from __future__ import annotations

TOLERANCES = {
    "grouped_w4a8_gemm": {"int8": 0.03, "fp8": 0.06},
    "grouped_w4a8_ffn": {"int8": 0.05, "fp8": 0.10},
    "w4a8_gemm": {"int8": 0.03, "fp8": 0.06},
    "paged_attention_prefill": {"int8": 0.03, "fp8": 0.08},
    "paged_int8_attention_decode": {"int8": 0.03, "fp8": 0.08},
    "sample": {"": 1e-3},
    "quantize_rows": {"int8": 0.05, "fp8": 0.05},
    "rms_norm_quantize": {"int8": 0.05, "fp8": 0.05},
    "rope_angles": {"": 0.01},
    "norm_rope": {"": 0.01},
    "norm_rope_append": {"": 0.01},
    "seal_pages": {"int8": 0.05, "fp8": 0.05},
    "move_pages": {"": 0.0},
    "route": {"": 0.01},
    "route_and_group": {"": 0.01},
    "group_rows": {"": 0.0},
}
"""For every kernel what each recipe is allowed; "" where a kernel has one recipe."""


def tolerance(kernel: str, case: str) -> float:
    """What is allowed of a kernel in a case, whose name holds the recipe's."""
    assert kernel in TOLERANCES, f"{kernel} has no tolerance: give it one in kernels/tolerance.py"
    recipes = TOLERANCES[kernel]
    named = [recipe for recipe in recipes if recipe in case.lower()]
    assert named, f"the case {case!r} of {kernel} names none of {', '.join(recipes)}"
    return recipes[max(named, key=len)]

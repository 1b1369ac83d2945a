"""SwiGLU at the end of a product, in registers."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu(gate, up, ASM: tl.constexpr):
    """`silu(gate) * up` of float32, to about 2^-20.

    In exact arithmetic the division and the ends of the exponential's range cost more instructions
    than all the rest. Here a sigmoid below 2^-126 is 0, and so is what `1 + inf` divides.
    """
    if ASM:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [gate * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        sigmoid = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1 + power],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        sigmoid = 1 / (1 + tl.exp(-gate))
    return gate * sigmoid * up

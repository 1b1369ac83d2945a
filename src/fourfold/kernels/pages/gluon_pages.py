"""What attention on Hopper does with sealed pages, in Gluon: for prompts, and for wide tiles of
decoding sequences.

Pages come by tensor copies to rings of shared memory. Weights of a page are rounded relative to the
page's largest, so that nothing has to be rescaled when a larger maximum appears: all pages are
weighted against one `base`.

Shapes: R query rows of a tile, N = 64 tokens per page, C head width, G KV heads.
"""

# mypy: ignore-errors

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout, scales_fetched

LOG2_127 = gl.constexpr(6.988684686772166)
LOG2_448 = gl.constexpr(8.807354922057604)
ROUND = gl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no bits for a fraction
# Weights are relative to 2 ** -60 of the first largest: as much room above as float32 leaves.
HEADROOM = gl.constexpr(60.0)
CAP = gl.constexpr(85.0)

# exp2, rounding to an integer, four to a word, and their sum. Half precision below its normal range
# is fixed point: the bits of 2 ** -24 times a number are the nearest integer.
_WEIGHTS_INT8 = gl.constexpr("""{
    .reg .f32 e0, e1, e2, e3;
    .reg .b32 a, b;
    ex2.approx.ftz.f32 e0, $5;
    ex2.approx.ftz.f32 e1, $6;
    ex2.approx.ftz.f32 e2, $7;
    ex2.approx.ftz.f32 e3, $8;
    cvt.rn.f16x2.f32 a, e1, e0;
    cvt.rn.f16x2.f32 b, e3, e2;
    prmt.b32 a, a, b, 0x6420;
    mov.b32 $0, a;
    mov.b32 b, 0x01010101;
    dp4a.u32.u32 $1, a, b, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
    mov.b32 $4, 0;
}""")
_WEIGHTS_FP8 = gl.constexpr("""{
    .reg .b16 a, b;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    ex2.approx.ftz.f32 $3, $7;
    ex2.approx.ftz.f32 $4, $8;
    cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
    mov.b32 $0, {a, b};
}""")


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def in_value_order(x_RN):
    """Columns of every 16 as `VALUE_ORDER` has them: four weights of a thread become neighbours."""
    x = x_RN.reshape([x_RN.shape[0], 4, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return x.reshape([x_RN.shape[0], 64])


@gluon.jit
def weights(x_RN, INT8: gl.constexpr):
    """Codes of 2 ** x, and numbers as many that add up to the sum of the weights: of integers, of
    which x has 24 less, one sum of every four that a thread has, and zeros."""
    if INT8:
        codes, parts = gl.inline_asm_elementwise(
            _WEIGHTS_INT8, "=r,=r,=r,=r,=r,f,f,f,f", [x_RN],
            dtype=(gl.int8, gl.int32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes, parts = gl.inline_asm_elementwise(
            _WEIGHTS_FP8, "=r,=f,=f,=f,=f,f,f,f,f", [x_RN],
            dtype=(gl.float8e4nv, gl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    return codes, parts


@gluon.jit
def operand(ring, stage):
    """A page's keys or values as a right operand: [C, N] or [N, C]."""
    return ring.index(stage).reshape([ring.shape[2], ring.shape[3]]).permute([1, 0])


@gluon.jit
def page_scale(scale_ring, at):
    """One of the float32 scales that came with the pages."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SIZE: gl.constexpr = scale_ring.shape[0] * scale_ring.shape[2]
    one = scale_ring._reinterpret(gl.float32, [SIZE, 1], flat).index(at)
    return gl.max(one.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


def descriptor(base: Tensor, block: list[int], dtype: gl.dtype) -> TensorDescriptor:
    """For copies of blocks of a tensor."""
    layout = _shared_layout(tuple(block), dtype)
    return TensorDescriptor(base, list(base.shape), list(base.stride()), block, layout)


def page_descriptors(
    records: Tensor, layout: PageLayout
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """For copies of one KV head's keys, [1, N, C], and values, [1, C, N], of a page, and of all of
    its scales, float32 [1, `scales_fetched`]."""
    code = gl.int8 if layout.codes is PageCodes.INT8 else gl.float8e4nv
    views, width = layout.views(records), layout.head_width
    scales = records.view(torch.float32)[:, layout.code_bytes // 4 :]
    return (
        descriptor(views.keys.flatten(1, 2), [1, PAGE_TOKENS, width], code),
        descriptor(views.values.flatten(1, 2), [1, width, PAGE_TOKENS], code),
        descriptor(scales, [1, scales_fetched(layout.kv_heads)], gl.float32),
    )


@functools.cache
def _shared_layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)

"""Gluon kernel of the W4A8 products for Hopper.

One group of warps brings packed weights (tensor copies), gathered token rows and the parameters of
groups (asynchronous copies) into a ring of shared memory. Two others multiply: each has two runs of
64 output rows against the same tokens, expands the weights of one run while the tensor cores work
on the other's, and lets the other group's products cover the end of its tile. A tile is 256 output
rows by TILE tokens: half of the traffic of two programs with tiles of 128 by 128.

Tokens are gathered, which Hopper's tensor copies cannot do. The copies' arrival on the ring's
barrier is what the products wait for; results equal the reference bit for bit without a fence
between the two (`tests/gpu`), which would cost every block a wait for all outstanding loads.

Shapes: as in `triton_gemm`.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fourfold.kernels.w4a8_gemm.gluon_multiply import RUN, multiply, run_of, tile_of

BOX = (RUN.value, 64)
"""Rows and bytes of packed weights that one copy brings."""


@gluon.jit
def _bring(
    x,
    weight,
    order,
    tiles,
    group,
    packed,
    params,
    low,
    high,
    full,
    empty,
    T,
    OUTPUTS,
    K,
    N,
    WIDTH,
    columns,
    SPAN: gl.constexpr,
    GROUPED: gl.constexpr,
    CHOICES: gl.constexpr,
    SWIGLU: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    # Group parameters as words of 32 bits: those of a run's rows, group after group, run after run.
    WORDS: gl.constexpr = params.shape[1]
    OFRUN: gl.constexpr = WORDS // 4
    OF_GROUP: gl.constexpr = OFRUN if SPAN != 64 else OFRUN // 2
    PACKED: gl.constexpr = RUN // OF_GROUP
    word = gl.arange(0, WORDS, gl.BlockedLayout([1], [32], [4], [0]))
    blocks = K // 128
    stage = 0
    phase = 1
    index = gl.program_id(0)
    last = N * columns - 1
    expert, row, end, column = tile_of(tiles, index, columns, T, N, TILE, GROUPED)
    source_T = _source(order, row + t, end, CHOICES)
    following = index + gl.num_programs(0)
    ahead = tile_of(tiles, gl.minimum(following, last), columns, T, N, TILE, GROUPED)
    while index <= last:
        # Asked for two tiles ahead, their rows one ahead, so that nobody waits for them.
        next_expert, next_row, next_end, next_column = ahead
        next_source_T = _source(order, next_row + t, next_end, CHOICES)
        following = index + 2 * gl.num_programs(0)
        ahead = tile_of(tiles, gl.minimum(following, last), columns, T, N, TILE, GROUPED)
        if expert >= 0:
            inside = (row + t < end)[:, None]
            x_T64 = x + source_T.to(gl.int64)[:, None] * K + j[None, :]
            w_row = expert * blocks * OUTPUTS
            if SPAN > 0:
                first = run_of(column, word // OFRUN, WIDTH, SWIGLU) // PACKED + word % OF_GROUP
                first = gl.minimum(first, OUTPUTS // PACKED - 1)
                first += word % OFRUN // OF_GROUP * (OUTPUTS // PACKED)
                words = group + expert.to(gl.int64) * (K // SPAN) * (OUTPUTS // PACKED) + first
            for block in range(blocks):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, 4 * RUN * 64)
                for which in gl.static_range(4):
                    first_row = w_row + block * OUTPUTS + run_of(column, which, WIDTH, SWIGLU)
                    tma.async_copy_global_to_shared(
                        weight, [first_row, 0], bar, packed.index(stage * 4 + which)
                    )
                async_copy.async_copy_global_to_shared(
                    low.index(stage), x_T64 + block * 128, inside
                )
                async_copy.async_copy_global_to_shared(
                    high.index(stage), x_T64 + (block * 128 + 64), inside
                )
                if SPAN > 0:
                    async_copy.async_copy_global_to_shared(
                        params.index(stage), words + block * (128 // SPAN) * (OUTPUTS // PACKED)
                    )
                async_copy.mbarrier_arrive(bar, increment_count=False)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        index += gl.num_programs(0)
        expert, row, end, column = next_expert, next_row, next_end, next_column
        source_T = next_source_T


@gluon.jit
def _source(order, rows, end, CHOICES: gl.constexpr):
    """Rows of x that the sorted rows come from; those past the last are the last's."""
    rows = gl.maximum(gl.minimum(rows, end - 1), 0)
    if CHOICES > 0:
        rows = gl.load(order + rows) // CHOICES
    return rows


@gluon.jit(do_not_specialize=["T", "N"])
def _gemm(
    x,
    x_scale,
    weight,
    w_scale,
    group,
    order,
    tiles,
    y,
    T,
    OUTPUTS,
    K,
    N,
    WIDTH,
    UNIT: gl.constexpr,
    INT8: gl.constexpr,
    SPAN: gl.constexpr,
    GROUPED: gl.constexpr,
    CHOICES: gl.constexpr,
    SCATTER: gl.constexpr,
    SWIGLU: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
):
    SHARED: gl.constexpr = gl.NVMMASharedLayout(64, 8, 2)
    packed = gl.allocate_shared_memory(gl.uint8, [STAGES * 4, RUN, 64], SHARED)
    low = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, TILE, 64], SHARED)
    high = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, TILE, 64], SHARED)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PARAM: gl.constexpr = group.dtype.element_ty if SPAN > 0 else gl.int16
    OF_BLOCK: gl.constexpr = 4 * RUN * (2 if SPAN == 64 else 1)
    WORDS: gl.constexpr = OF_BLOCK * PARAM.primitive_bitwidth // 32
    params = gl.allocate_shared_memory(PARAM, [STAGES, OF_BLOCK], FLAT)
    OUT: gl.constexpr = gl.NVMMASharedLayout(128, y.dtype.element_ty.primitive_bitwidth, 2)
    turned = gl.allocate_shared_memory(y.dtype.element_ty, [2, TILE, RUN], OUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=2)
    columns = gl.cdiv(WIDTH, (2 if SWIGLU else 4) * RUN)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    x_scale,
                    w_scale,
                    order,
                    tiles,
                    y,
                    packed,
                    params,
                    low,
                    high,
                    turned.index(0),
                    full,
                    empty,
                    T,
                    OUTPUTS,
                    K,
                    N,
                    WIDTH,
                    columns,
                    gl.constexpr(0),
                    UNIT,
                    INT8,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SCATTER,
                    SWIGLU,
                    TILE,
                    STAGES,
                    UNROLL,
                ),
            ),
            (
                multiply,
                (
                    x_scale,
                    w_scale,
                    order,
                    tiles,
                    y,
                    packed,
                    params,
                    low,
                    high,
                    turned.index(1),
                    full,
                    empty,
                    T,
                    OUTPUTS,
                    K,
                    N,
                    WIDTH,
                    columns,
                    gl.constexpr(1),
                    UNIT,
                    INT8,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SCATTER,
                    SWIGLU,
                    TILE,
                    STAGES,
                    UNROLL,
                ),
            ),
            (
                _bring,
                (
                    x,
                    weight,
                    order,
                    tiles,
                    group.to(gl.pointer_type(gl.int32), bitcast=True),
                    packed,
                    params._reinterpret(gl.int32, [STAGES, WORDS], FLAT),
                    low,
                    high,
                    full,
                    empty,
                    T,
                    OUTPUTS,
                    K,
                    N,
                    WIDTH,
                    columns,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SWIGLU,
                    TILE,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [240, 40],
    )

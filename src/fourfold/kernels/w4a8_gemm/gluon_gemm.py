"""Gluon kernel of the W4A8 products for Hopper.

Weights of 8 bits, which dense products may have, are multiplied where they lie.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    BITS: gl.constexpr,
    SPAN: gl.constexpr,
    GROUPED: gl.constexpr,
    CHOICES: gl.constexpr,
    SWIGLU: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    RUNS: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    # Group parameters as words of 32 bits: those of a run's rows, group after group, run after run.
    WORDS: gl.constexpr = params.shape[1]
    OFRUN: gl.constexpr = WORDS // RUNS
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
                first = (
                    run_of(column, word // OFRUN, WIDTH, SWIGLU, RUNS) // PACKED + word % OF_GROUP
                )
                first = gl.minimum(first, OUTPUTS // PACKED - 1)
                first += word % OFRUN // OF_GROUP * (OUTPUTS // PACKED)
                words = group + expert.to(gl.int64) * (K // SPAN) * (OUTPUTS // PACKED) + first
            for block in range(blocks):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, RUNS * RUN * 16 * BITS)
                for which in gl.static_range(RUNS):
                    first_row = run_of(column, which, WIDTH, SWIGLU, RUNS)
                    if BITS == 4:
                        tma.async_copy_global_to_shared(
                            weight,
                            [w_row + block * OUTPUTS + first_row, 0],
                            bar,
                            packed.index(stage * RUNS + which),
                        )
                    else:
                        for half in gl.static_range(2):
                            tma.async_copy_global_to_shared(
                                weight,
                                [first_row, block * 128 + half * 64],
                                bar,
                                packed.index((stage * RUNS + which) * 2 + half),
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
    BITS: gl.constexpr,
    INT8: gl.constexpr,
    SPAN: gl.constexpr,
    GROUPED: gl.constexpr,
    CHOICES: gl.constexpr,
    SCATTER: gl.constexpr,
    SWIGLU: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
):
    RUNS: gl.constexpr = 2 if SPLIT else 4
    SHARED: gl.constexpr = gl.NVMMASharedLayout(64, 8, 2)
    WEIGHTS: gl.constexpr = gl.uint8 if BITS == 4 else x.dtype.element_ty
    packed = gl.allocate_shared_memory(WEIGHTS, [STAGES * RUNS * BITS // 4, RUN, 64], SHARED)
    low = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, TILE, 64], SHARED)
    high = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, TILE, 64], SHARED)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PARAM: gl.constexpr = group.dtype.element_ty if SPAN > 0 else gl.int16
    OF_BLOCK: gl.constexpr = RUNS * RUN * (2 if SPAN == 64 else 1)
    WORDS: gl.constexpr = OF_BLOCK * PARAM.primitive_bitwidth // 32
    params = gl.allocate_shared_memory(PARAM, [STAGES, OF_BLOCK], FLAT)
    OUT: gl.constexpr = gl.NVMMASharedLayout(128, y.dtype.element_ty.primitive_bitwidth, 2)
    turned = gl.allocate_shared_memory(y.dtype.element_ty, [2, TILE, RUN], OUT)
    # What the second group hands to the first where they split input channels.
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sums = gl.allocate_shared_memory(SUM, [2, RUN, TILE if SPLIT else 1], PLAIN)
    meeting = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(meeting.index(i), count=1)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=1 if SPLIT else 2)
    columns = gl.cdiv(WIDTH, (RUNS // 2 if SWIGLU else RUNS) * RUN)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
                    sums,
                    meeting,
                    T,
                    OUTPUTS,
                    K,
                    N,
                    WIDTH,
                    columns,
                    gl.constexpr(0),
                    UNIT,
                    BITS,
                    INT8,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SCATTER,
                    SWIGLU,
                    TILE,
                    STAGES,
                    UNROLL,
                    SPLIT,
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
                    sums,
                    meeting,
                    T,
                    OUTPUTS,
                    K,
                    N,
                    WIDTH,
                    columns,
                    gl.constexpr(1),
                    UNIT,
                    BITS,
                    INT8,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SCATTER,
                    SWIGLU,
                    TILE,
                    STAGES,
                    UNROLL,
                    SPLIT,
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
                    BITS,
                    SPAN,
                    GROUPED,
                    CHOICES,
                    SWIGLU,
                    TILE,
                    STAGES,
                    RUNS,
                ),
            ),
        ],
        [4, 4],
        [104, 40] if SPLIT else [240, 40],
    )

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

from fourfold.kernels.w4a8_gemm.gluon_multiply import RUN, Product, multiply, run_of, tile_of

BOX = (RUN.value, 64)
"""Rows and bytes of packed weights that one copy brings."""


@gluon.jit
def _bring(p, x, weight, words):
    """The group that fills the rings; `words` are the groups' parameters, as words of 32 bits."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, p.TILE, gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    # Those of a run's rows, group after group, run after run.
    WORDS: gl.constexpr = p.params.shape[1] * p.params.dtype.primitive_bitwidth // 32
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    params = p.params._reinterpret(gl.int32, [p.STAGES, WORDS], FLAT)
    OFRUN: gl.constexpr = WORDS // p.RUNS
    OF_GROUP: gl.constexpr = OFRUN if p.SPAN != 64 else OFRUN // 2
    PACKED: gl.constexpr = RUN // OF_GROUP
    word = gl.arange(0, WORDS, gl.BlockedLayout([1], [32], [4], [0]))
    blocks = p.K // 128
    stage = 0
    phase = 1
    index = gl.program_id(0)
    last = p.N * p.columns - 1
    expert, row, end, column = tile_of(p, index)
    source_T = _source(p, row + t, end)
    following = index + gl.num_programs(0)
    ahead = tile_of(p, gl.minimum(following, last))
    while index <= last:
        # Asked for two tiles ahead, their rows one ahead, so that nobody waits for them.
        next_expert, next_row, next_end, next_column = ahead
        next_source_T = _source(p, next_row + t, next_end)
        following = index + 2 * gl.num_programs(0)
        ahead = tile_of(p, gl.minimum(following, last))
        if expert >= 0:
            inside = (row + t < end)[:, None]
            x_T64 = x + source_T.to(gl.int64)[:, None] * p.K + j[None, :]
            w_row = expert * blocks * p.OUTPUTS
            if p.SPAN > 0:
                first = run_of(p, column, word // OFRUN) // PACKED + word % OF_GROUP
                first = gl.minimum(first, p.OUTPUTS // PACKED - 1)
                first += word % OFRUN // OF_GROUP * (p.OUTPUTS // PACKED)
                of_expert = expert.to(gl.int64) * (p.K // p.SPAN) * (p.OUTPUTS // PACKED)
                words_of = words + of_expert + first
            for block in range(blocks):
                mbarrier.wait(p.empty.index(stage), phase)
                bar = p.full.index(stage)
                mbarrier.expect(bar, p.RUNS * RUN * 16 * p.BITS)
                for which in gl.static_range(p.RUNS):
                    first_row = run_of(p, column, which)
                    if p.BITS == 4:
                        tma.async_copy_global_to_shared(
                            weight,
                            [w_row + block * p.OUTPUTS + first_row, 0],
                            bar,
                            p.packed.index(stage * p.RUNS + which),
                        )
                    else:
                        for half in gl.static_range(2):
                            tma.async_copy_global_to_shared(
                                weight,
                                [first_row, block * 128 + half * 64],
                                bar,
                                p.packed.index((stage * p.RUNS + which) * 2 + half),
                            )
                async_copy.async_copy_global_to_shared(
                    p.low.index(stage), x_T64 + block * 128, inside
                )
                async_copy.async_copy_global_to_shared(
                    p.high.index(stage), x_T64 + (block * 128 + 64), inside
                )
                if p.SPAN > 0:
                    async_copy.async_copy_global_to_shared(
                        params.index(stage),
                        words_of + block * (128 // p.SPAN) * (p.OUTPUTS // PACKED),
                    )
                async_copy.mbarrier_arrive(bar, increment_count=False)
                stage += 1
                if stage == p.STAGES:
                    stage = 0
                    phase ^= 1
        index += gl.num_programs(0)
        expert, row, end, column = next_expert, next_row, next_end, next_column
        source_T = next_source_T


@gluon.jit
def _source(p, rows, end):
    """Rows of x that the sorted rows come from; those past the last are the last's."""
    rows = gl.maximum(gl.minimum(rows, end - 1), 0)
    if p.CHOICES > 0:
        rows = gl.load(p.order + rows) // p.CHOICES
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
    p = Product(
        x_scale=x_scale,
        w_scale=w_scale,
        order=order,
        tiles=tiles,
        y=y,
        packed=packed,
        params=params,
        low=low,
        high=high,
        turned=turned,
        full=full,
        empty=empty,
        sums=sums,
        meeting=meeting,
        T=T,
        OUTPUTS=OUTPUTS,
        K=K,
        N=N,
        WIDTH=WIDTH,
        columns=columns,
        UNIT=UNIT,
        BITS=BITS,
        INT8=INT8,
        SPAN=SPAN,
        GROUPED=GROUPED,
        CHOICES=CHOICES,
        SCATTER=SCATTER,
        SWIGLU=SWIGLU,
        TILE=TILE,
        STAGES=STAGES,
        UNROLL=UNROLL,
        SPLIT=SPLIT,
        RUNS=RUNS,
    )
    words = group.to(gl.pointer_type(gl.int32), bitcast=True)
    gl.warp_specialize(
        [(multiply, (p, 0)), (multiply, (p, 1)), (_bring, (p, x, weight, words))],
        [4, 4],
        [104, 40] if SPLIT else [240, 40],
    )

"""Gluon kernel of dense products with weights of 8 bits for Hopper, for some to a thousand tokens.

So few tokens make few tiles, and a product is over soon after it has begun: what counts is that its
reading begins early. Weights are nobody's results, so as many blocks of them as the ring holds are
asked for before the kernels in front have ended.

One warp brings blocks of 128 input channels of weights and tokens (tensor copies) into a ring of
shared memory, the others multiply.

Shapes: T tokens, O outputs, K input channels, N tiles of tokens.
"""

# mypy: ignore-errors
# Annotations of `Tile` are types that Triton looks at, so they are not postponed.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.w4a8_gemm.gluon_multiply import by_name


@aggregate
class Tile:
    """A program's tile of a product, and its shared memory."""

    tokens: gl.shared_memory_descriptor
    """The rings, and their barriers."""
    weights: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    row: gl.tensor
    """First token; first output; blocks of input channels."""
    output: gl.tensor
    blocks: gl.tensor

    __init__ = by_name


@gluon.jit
def _bring(p, x, weight):
    """The warp that fills the rings."""
    STAGES: gl.constexpr = p.full.shape[0]
    TILE: gl.constexpr = p.tokens.shape[1]
    ROWS: gl.constexpr = p.weights.shape[1]
    early = gl.minimum(p.blocks, STAGES)
    for block in range(early):
        bar = p.full.index(block)
        mbarrier.expect(bar, (TILE + ROWS) * 128)
        place = [p.output, block * 128]
        tma.async_copy_global_to_shared(weight, place, bar, p.weights.index(block))
    gdc_wait()
    gdc_launch_dependents()
    for block in range(early):
        place = [p.row, block * 128]
        tma.async_copy_global_to_shared(x, place, p.full.index(block), p.tokens.index(block))
    stage = 0
    phase = 0
    for block in range(early, p.blocks):
        mbarrier.wait(p.empty.index(stage), phase)
        bar = p.full.index(stage)
        mbarrier.expect(bar, (TILE + ROWS) * 128)
        channel = block * 128
        tma.async_copy_global_to_shared(weight, [p.output, channel], bar, p.weights.index(stage))
        tma.async_copy_global_to_shared(x, [p.row, channel], bar, p.tokens.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _multiply(p, x_scale, w_scale, y, T, OUTPUTS):
    """The warps that multiply: 16 tokens of the tile are a warp's."""
    STAGES: gl.constexpr = p.full.shape[0]
    TILE: gl.constexpr = p.tokens.shape[1]
    ROWS: gl.constexpr = p.weights.shape[1]
    INT8: gl.constexpr = p.tokens.dtype == gl.int8
    SUMS: gl.constexpr = gl.int32 if INT8 else gl.float32
    WIDE: gl.constexpr = min(ROWS, 128)  # 256 would do, but not to Triton 3.6 with int8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [TILE // 16, 1], [16, WIDE, 32])
    t = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
    o = gl.arange(0, ROWS, gl.SliceLayout(0, MMA))
    gdc_wait()  # for the scales of the tokens, and before memory is written
    sums = gl.zeros([TILE, ROWS], SUMS, MMA)
    stage = 0
    phase = 0
    before = 0
    for block in range(p.blocks):
        mbarrier.wait(p.full.index(stage), phase)
        right = p.weights.index(stage).permute((1, 0))
        sums = warpgroup_mma(p.tokens.index(stage), right, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(p.empty.index(before), count=1, pred=block > 0)
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    sums = warpgroup_mma_wait(0, deps=(sums,))

    scale_t = gl.load(x_scale + gl.minimum(p.row + t, T - 1))
    scale_o = gl.load(w_scale + gl.minimum(p.output + o, OUTPUTS - 1))
    result = sums.to(gl.float32) * (scale_t[:, None] * scale_o[None, :])
    # The ring is free by now.
    BITS: gl.constexpr = y.dtype.element_ty.primitive_bitwidth
    TURNED: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    turned = p.weights._reinterpret(y.dtype.element_ty, [TILE, ROWS], TURNED)
    gl.thread_barrier()
    turned.store(result.to(y.dtype.element_ty))
    gl.thread_barrier()
    ACROSS: gl.constexpr = ROWS // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [TILE // 16, 1], [1, 0])
    goal_t = p.row + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
    goal_o = p.output + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    inside = (goal_t < T)[:, None] & (goal_o < OUTPUTS)[None, :]
    goal = y + goal_t.to(gl.int64)[:, None] * OUTPUTS + goal_o[None, :]
    gl.store(goal, turned.load(OUT), inside)


@gluon.jit(do_not_specialize=["T", "N"])
def _gemm(
    x,
    weight,
    x_scale,
    w_scale,
    y,
    T,
    OUTPUTS,
    K,
    N,
    STAGES: gl.constexpr,
):
    TILE: gl.constexpr = x.block_shape[0]
    ROWS: gl.constexpr = weight.block_shape[0]
    tokens = gl.allocate_shared_memory(x.dtype, [STAGES, TILE, 128], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, 128], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # Those that read the same weights follow one another.
    tile = gl.program_id(0)
    p = Tile(
        tokens=tokens,
        weights=weights,
        full=full,
        empty=empty,
        row=tile % N * TILE,
        output=tile // N * ROWS,
        blocks=K // 128,
    )
    gl.warp_specialize(
        [
            (_multiply, (p, x_scale, w_scale, y, T, OUTPUTS)),
            (_bring, (p, x, weight)),
        ],
        [1],
        [40],
    )

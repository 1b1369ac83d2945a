"""What the groups of warps of the Gluon kernel share, and the groups that multiply.

Shapes: as in `triton_gemm`.
"""

# mypy: ignore-errors
# Annotations of `Product` are types that Triton looks at, so they are not postponed.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate
from triton.language.core import base_value

from fourfold.kernels.w4a8_gemm import triton_expand, triton_swiglu

RUN = gl.constexpr(64)
"""Output rows of a run."""

_int8_channel = gluon.jit(triton_expand.expand_int8_channel.fn)
_int8_group = gluon.jit(triton_expand.expand_int8_group.fn)
_fp8_channel = gluon.jit(triton_expand.expand_fp8_channel.fn)
_fp8_group = gluon.jit(triton_expand.expand_fp8_group.fn)
_group_words = gluon.jit(triton_expand.group_words.fn)
_lookup_words = gluon.jit(triton_expand.lookup_words.fn)
swiglu = gluon.jit(triton_swiglu.swiglu.fn)


@gluon.constexpr_function
def by_name(self, **fields):
    for name, value in fields.items():
        setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))


@aggregate
class Product:
    """A launch, and the shared memory of a program, as its groups of warps see them."""

    x_scale: gl.tensor
    w_scale: gl.tensor
    order: gl.tensor
    tiles: gl.tensor
    y: gl.tensor
    packed: gl.shared_memory_descriptor
    """The rings: weights of each stage and run, parameters of groups, halves of token rows."""
    params: gl.shared_memory_descriptor
    low: gl.shared_memory_descriptor
    high: gl.shared_memory_descriptor
    turned: gl.shared_memory_descriptor
    """Results of each multiplying group on their way out."""
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    """What the second group hands to the first where they split input channels."""
    meeting: gl.shared_memory_descriptor
    T: gl.tensor
    OUTPUTS: gl.tensor
    K: gl.tensor
    N: gl.tensor
    WIDTH: gl.tensor
    columns: gl.tensor
    UNIT: gl.constexpr
    BITS: gl.constexpr
    INT8: gl.constexpr
    SPAN: gl.constexpr
    GROUPED: gl.constexpr
    CHOICES: gl.constexpr
    SCATTER: gl.constexpr
    SWIGLU: gl.constexpr
    TILE: gl.constexpr
    STAGES: gl.constexpr
    UNROLL: gl.constexpr
    SPLIT: gl.constexpr
    RUNS: gl.constexpr

    __init__ = by_name


@gluon.jit
def tile_of(p, index):
    """Expert, first row, end and column of a tile; the expert is -1 where there is none."""
    n = index // p.columns
    expert, row, end = 0, n * p.TILE, p.T
    if p.GROUPED:
        expert = gl.load(p.tiles + n)
        row, end = gl.load(p.tiles + p.N + n), gl.load(p.tiles + 2 * p.N + n)
    return gl.to_tensor(expert), row, end, index % p.columns


@gluon.jit
def run_of(p, column, which):
    """First output row of one of a tile's runs: two of each multiplying group, or of both."""
    if p.SWIGLU:
        first = (which % 2) * p.WIDTH + column * (p.RUNS // 2 * RUN) + (which // 2) * RUN
    else:
        first = column * (p.RUNS * RUN) + which * RUN
    return first


@gluon.jit
def _group(params, run: gl.constexpr, layout: gl.constexpr, SPAN: gl.constexpr):
    """A run's parameters for its low and its high channels."""
    low = 0
    high = 0
    if SPAN == 128:
        low = params.slice(run * RUN, RUN).load(layout)
        high = low
    elif SPAN == 64:
        low = params.slice(run * 2 * RUN, RUN).load(layout)
        high = params.slice((run * 2 + 1) * RUN, RUN).load(layout)
    return low, high


@gluon.jit
def expand(packed, low, high, INT8: gl.constexpr, SPAN: gl.constexpr):
    AXIS: gl.constexpr = len(packed.shape) - 1
    if SPAN == 0:
        if INT8:
            a, b = _int8_channel(packed, True)
        else:
            a, b = _fp8_channel(packed, True)
    elif INT8:
        low_step, low_offset = _group_words(low)
        high_step, high_offset = _group_words(high)
        a, b = _int8_group(
            packed,
            gl.expand_dims(low_step, AXIS),
            gl.expand_dims(low_offset, AXIS),
            gl.expand_dims(high_step, AXIS),
            gl.expand_dims(high_offset, AXIS),
            True,
        )
    else:
        of_0_to_3, of_4_to_7 = _lookup_words(low)
        a, b = _fp8_group(
            packed, gl.expand_dims(of_0_to_3, AXIS), gl.expand_dims(of_4_to_7, AXIS), True
        )
    return a, b


@gluon.jit
def _left(p, run, low, high, layout: gl.constexpr):
    """Left operands of a run for the low and the high channels of a block."""
    if p.BITS == 4:
        a, b = expand(p.packed.index(run).load(layout), low, high, p.INT8, p.SPAN)
    else:
        a, b = p.packed.index(2 * run), p.packed.index(2 * run + 1)
    return a, b


@gluon.jit
def _multiply_tile(
    p, expert, row, end, column, stage, phase, turn, PART: gl.constexpr, ROWS: gl.constexpr
):
    """Two runs of output rows against the first ROWS tokens of the tile; with SPLIT every other
    block of input channels, the first group adding what the second got."""
    FIRST: gl.constexpr = 0 if p.SPLIT else 2 * PART
    STRIDE: gl.constexpr = 2 if p.SPLIT else 1
    WRITES: gl.constexpr = PART == 0 or not p.SPLIT
    SUMS: gl.constexpr = gl.int32 if p.INT8 else gl.float32
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LEFT)
    h_mma = gl.arange(0, RUN, gl.SliceLayout(1, MMA))
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    t_line = gl.arange(0, ROWS, LINE)
    t_out = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    h_out = gl.arange(0, RUN, gl.SliceLayout(0, OUT))
    blocks = p.K // 128
    first1 = run_of(p, column, FIRST)
    first2 = run_of(p, column, FIRST + 1)
    # What the end of the tile needs, asked for while it multiplies.
    source_t = gl.minimum(row + t_line, end - 1)
    if p.CHOICES > 0:
        source_t = gl.load(p.order + source_t)
        scale_t = gl.zeros([ROWS], gl.float32, LINE)
    else:
        scale_t = gl.load(p.x_scale + source_t)
    of_expert = p.w_scale + expert * p.OUTPUTS
    scale1 = gl.load(of_expert + gl.minimum(first1 + h_mma, p.OUTPUTS - 1))
    scale2 = gl.load(of_expert + gl.minimum(first2 + h_mma, p.OUTPUTS - 1))
    goal_t = row + t_out
    inside = (goal_t < end)[:, None]
    if p.SCATTER:
        goal_t = gl.load(p.order + gl.minimum(goal_t, end - 1))

    sums1 = gl.zeros([RUN, ROWS], SUMS, MMA)
    sums2 = gl.zeros([RUN, ROWS], SUMS, MMA)
    for block in range(0, blocks, p.UNROLL * STRIDE):
        before = stage
        for ahead in gl.static_range(p.UNROLL):
            mbarrier.wait(p.full.index(stage), phase)
            x_low = p.low.index(stage).slice(0, ROWS).permute((1, 0))
            x_high = p.high.index(stage).slice(0, ROWS).permute((1, 0))
            low1, high1 = _group(p.params.index(stage), FIRST, ROW, p.SPAN)
            if ahead > 0:
                # The first run's registers are free; the second run still multiplies.
                sums1 = warpgroup_mma_wait(2, deps=(sums1,))
            a, b = _left(p, stage * p.RUNS + FIRST, low1, high1, LEFT)
            sums1 = warpgroup_mma(a, x_low, sums1, is_async=True)
            sums1 = warpgroup_mma(b, x_high, sums1, is_async=True)
            low2, high2 = _group(p.params.index(stage), FIRST + 1, ROW, p.SPAN)
            if ahead > 0:
                sums2 = warpgroup_mma_wait(2, deps=(sums2,))
                mbarrier.arrive(p.empty.index(before), count=1)
            a, b = _left(p, stage * p.RUNS + FIRST + 1, low2, high2, LEFT)
            sums2 = warpgroup_mma(a, x_low, sums2, is_async=True)
            sums2 = warpgroup_mma(b, x_high, sums2, is_async=True)
            before = stage
            stage += STRIDE
            if stage >= p.STAGES:
                stage -= p.STAGES
                phase ^= 1
        # Products that outlive an iteration would make the compiler wait after each of them.
        sums1, sums2 = warpgroup_mma_wait(0, deps=(sums1, sums2))
        mbarrier.arrive(p.empty.index(before), count=1)
        if p.CHOICES > 0:  # noqa: SIM102 (the outer is decided when compiled)
            if block == 0:
                scale_t = gl.load(p.x_scale + source_t // p.CHOICES)

    if p.SPLIT:
        if PART == 1:
            mbarrier.wait(p.meeting.index(1), turn ^ 1)
            p.sums.index(0).slice(0, ROWS, 1).store(sums1)
            p.sums.index(1).slice(0, ROWS, 1).store(sums2)
            mbarrier.arrive(p.meeting.index(0), count=1)
        else:
            mbarrier.wait(p.meeting.index(0), turn)
            sums1 += p.sums.index(0).slice(0, ROWS, 1).load(MMA)
            sums2 += p.sums.index(1).slice(0, ROWS, 1).load(MMA)
            mbarrier.arrive(p.meeting.index(1), count=1)
    if WRITES:
        scale_t = gl.convert_layout(scale_t, gl.SliceLayout(0, MMA))[None, :]
        gate = sums1.to(gl.float32) * (scale_t * (scale1 * p.UNIT)[:, None])
        up = sums2.to(gl.float32) * (scale_t * (scale2 * p.UNIT)[:, None])
        y_T1 = p.y + goal_t.to(gl.int64)[:, None] * p.WIDTH
        part = p.turned.index(PART).slice(0, ROWS)
        if p.SWIGLU:
            gate = swiglu(gate, up, True)
        o = (first1 + h_out)[None, :]
        part.store(gl.permute(gate.to(p.y.dtype.element_ty), (1, 0)))
        gl.store(y_T1 + o, part.load(OUT), inside & (o < p.WIDTH))
        if not p.SWIGLU:
            o = (first2 + h_out)[None, :]
            part.store(gl.permute(up.to(p.y.dtype.element_ty), (1, 0)))
            gl.store(y_T1 + o, part.load(OUT), inside & (o < p.WIDTH))
    return stage, phase, turn ^ 1


@gluon.jit
def multiply(p, PART: gl.constexpr):
    """One of the two groups that multiply: its part of every tile of the program."""
    stage = PART if p.SPLIT else 0
    phase = 0
    turn = 0
    index = gl.program_id(0)
    last = p.N * p.columns - 1
    expert, row, end, column = tile_of(p, index)
    while index <= last:
        following = index + gl.num_programs(0)
        # Asked for a tile ahead, so that nobody waits for it.
        ahead = tile_of(p, gl.minimum(following, last))
        if expert >= 0:
            if end - row <= p.TILE // 2:
                stage, phase, turn = _multiply_tile(
                    p, expert, row, end, column, stage, phase, turn, PART, p.TILE // 2
                )
            else:
                stage, phase, turn = _multiply_tile(
                    p, expert, row, end, column, stage, phase, turn, PART, p.TILE
                )
        index = following
        expert, row, end, column = ahead

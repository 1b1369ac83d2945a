"""Gluon kernel of products of few tokens on Hopper: one latency, not a chain of them.

Two products come here: dense ones with weights of 8 bits, and the experts' second with weights of
4 bits, whose rows lie in sorted order and go to their flat places.

A program asks for all of its weights at once, before it waits for the kernel in front of it: of
that one it needs the rows' codes and their scales alone. What is left after the wait are the codes
and their products. Warps share out the blocks of input channels; their sums are added at the end.

A thread reads 16 channels of a row from each half of a block. Tensor cores count them otherwise,
but alike in both operands. Weights pass through shared memory for not taking registers while they
are on their way: a thread reads what it wrote.

Shapes: S parts of the input channels, R output rows of a program, T tokens of a turn; else as in
`triton_gemm`.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.w4a8_gemm.gluon_multiply import expand


@gluon.constexpr_function
def _half_block(split, across, rows):
    """How threads hold bytes [S, R, 64]: as the 64 channels of a left operand that they feed."""
    registers = [[0, 0, 1 << i] for i in range(4)] + [[0, 8, 0]]
    registers += [[0, 16 * across << i, 0] for i in range((rows // (16 * across)).bit_length() - 1)]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 16 << i, 0] for i in range(across.bit_length() - 1)]
    warps += [[1 << i, 0, 0] for i in range(split.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [split, rows, 64])


@gluon.jit
def _asked():
    """Keeps loads on their side: ptxas would mix those that wait for others with the rest."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


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
    OUTPUTS: gl.constexpr,
    K: gl.constexpr,
    N,
    UNIT: gl.constexpr,
    INT8: gl.constexpr,
    SPAN: gl.constexpr,
    ROWS: gl.constexpr,
    TILE: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Program (c, n): the c-th run of output rows of the n-th tile."""
    BLOCKS: gl.constexpr = K // 128 // SPLIT
    GROUPED: gl.constexpr = weight.dtype.element_ty == gl.uint8
    BITS: gl.constexpr = 4 if GROUPED else 8
    PARTS: gl.constexpr = BITS // 4
    TURN: gl.constexpr = 8 if GROUPED else TILE
    SUMS: gl.constexpr = gl.int32 if INT8 else gl.float32
    ACROSS: gl.constexpr = gl.num_warps() // SPLIT
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, ACROSS, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 16)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 16)
    BYTES: gl.constexpr = _half_block(SPLIT, ACROSS, ROWS)
    # A thread adds up all parts of a sum.
    ADDED: gl.constexpr = gl.BlockedLayout(
        [SPLIT, 1, 1], [1, 32 // TURN, TURN], [1, gl.num_warps(), 1], [2, 1, 0]
    )
    OUT: gl.constexpr = gl.SliceLayout(0, ADDED)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    # One of these for all would have a barrier between copies to different parts of it.
    halves = ()
    for _half in gl.static_range(BLOCKS * PARTS):
        halves += (gl.allocate_shared_memory(weight.dtype.element_ty, [SPLIT, ROWS, 64], PLAIN),)
    parts = gl.allocate_shared_memory(SUMS, [SPLIT, ROWS, TURN], PLAIN)
    first = gl.program_id(0) * ROWS
    n = gl.program_id(1)
    expert, row, end = 0, n * TILE, T
    if GROUPED:
        # Not from the L1 cache, which may remember what was there before.
        expert = gl.load(tiles + n, cache_modifier=".cg")
        row = gl.load(tiles + N + n, cache_modifier=".cg")
        end = gl.load(tiles + 2 * N + n, cache_modifier=".cg")
    if (expert < 0) | (row >= end):
        # Whoever comes next relies on every program to have waited.
        gdc_wait()
        gdc_launch_dependents()
    else:
        t = gl.arange(0, TURN, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
        t_out = gl.arange(0, TURN, gl.SliceLayout(0, OUT))
        goal_T = _goals(order, row + t_out, end, GROUPED)

        of_expert = gl.to_tensor(expert).to(gl.int64) * OUTPUTS
        s = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, BYTES)))[:, None]
        r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, BYTES)))[None, :]
        j = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, BYTES)))[None, None, :]
        o_R = first + r
        o = first + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
        if OUTPUTS % ROWS != 0:
            o_R = gl.minimum(o_R, OUTPUTS - 1)
        # In bytes, BLOCK from one block to the next.
        if GROUPED:
            at = s * (BLOCKS * OUTPUTS * 64) + o_R * 64
            BLOCK: gl.constexpr = OUTPUTS * 64
        else:
            at = o_R.to(gl.int64) * K + s * (BLOCKS * 128)
            BLOCK: gl.constexpr = 128
        from_SRJ = weight + of_expert * (K // 8 * BITS) + (at[:, :, None] + j)
        for i in gl.static_range(BLOCKS):
            for part in gl.static_range(PARTS):
                async_copy.async_copy_global_to_shared(
                    halves[i * PARTS + part],
                    from_SRJ + (i * BLOCK + part * 64),
                    cache_modifier=".cg",
                )
            async_copy.commit_group()
        params = ()
        if SPAN > 0:
            GROUPS: gl.constexpr = 128 // SPAN
            from_SR = group + of_expert * (K // SPAN) + (s * (BLOCKS * GROUPS * OUTPUTS) + o_R)
            for i in gl.static_range(BLOCKS * GROUPS):
                params += (gl.load(from_SR + i * OUTPUTS),)
        scale_R = gl.load(w_scale + of_expert + gl.minimum(o, OUTPUTS - 1))
        s = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
        k = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
        x_SK1 = x + (s * (BLOCKS * 128) + k)
        _asked()
        gdc_wait()
        gdc_launch_dependents()

        for turn in gl.static_range(0, TILE, TURN):
            if row + turn < end:
                if turn > 0:
                    goal_T = _goals(order, row + turn + t_out, end, GROUPED)
                source = gl.minimum(row + turn + t, end - 1)
                rows = x_SK1 + source.to(gl.int64) * K
                codes = ()
                for i in gl.static_range(BLOCKS):
                    codes += (gl.load(rows + i * 128),)
                scale_T = gl.load(x_scale + gl.minimum(row + turn + t_out, end - 1))
                _asked()
                sums = gl.zeros([SPLIT, ROWS, TURN], SUMS, MMA)
                for i in gl.static_range(BLOCKS):
                    async_copy.wait_group(BLOCKS - 1 - i)
                    low = halves[i * PARTS].load(BYTES)
                    if not GROUPED:
                        high = halves[i * PARTS + 1].load(BYTES)
                    elif SPAN == 0:
                        low, high = expand(low, 0, 0, INT8, 0)
                    else:
                        of_low = params[i * GROUPS]
                        low, high = expand(low, of_low, params[i * GROUPS + GROUPS - 1], INT8, SPAN)
                    both = gl.permute(gl.join(low, high), (0, 1, 3, 2))
                    both = gl.reshape(both, [SPLIT, ROWS, 128])
                    left = gl.convert_layout(both, LEFT, assert_trivial=True)
                    sums = mma_v2(left, codes[i], sums)
                parts.store(sums)
                y_RT = gl.sum(parts.load(ADDED), 0).to(gl.float32)
                y_RT *= scale_T[None, :] * (scale_R * UNIT)[:, None]
                inside = (row + turn + t_out < end)[None, :] & (o < OUTPUTS)[:, None]
                to = y + (goal_T.to(gl.int64) * OUTPUTS)[None, :] + o[:, None]
                gl.store(to, y_RT.to(y.dtype.element_ty), inside)


@gluon.jit
def _goals(order, row, end, GROUPED: gl.constexpr):
    """Where rows go to; past the end, as the last row."""
    row = gl.minimum(row, end - 1)
    if GROUPED:
        row = gl.load(order + row, cache_modifier=".cg")
    return row

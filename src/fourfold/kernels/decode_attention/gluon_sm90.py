"""Decode attention in tiles of 64 query rows on Hopper: sequences that share pages, several rows of
one sequence.

A program is one warpgroup. Tensor copies bring pages to a ring of shared memory, the first of them
before the kernel in front has ended. Both products are asynchronous: values are multiplied in two
halves of the head, and the next page's scores are under way while these join the sums. Two programs
share an SM, so that exponentials of one run beside products of another.

All pages are weighted against the largest score of the task's first page, with room for 2 ** 145
above it in float32; a page beyond that is capped. The scores' registers are those of the weights,
because values lie in `VALUE_ORDER`.

Shapes: M = 64 query rows of a tile, N = 64 tokens per page, C head width, G KV heads.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.decode_attention.plan import TASK_FIELDS
from fourfold.kernels.pages.gluon_pages import (
    CAP,
    HEADROOM,
    LOG2_127,
    LOG2_448,
    ROUND,
    exp2,
    in_value_order,
    operand,
    page_scale,
    weights,
)

_FIELDS = gl.constexpr(TASK_FIELDS)
_M = gl.constexpr(64)
_N = gl.constexpr(64)
_HALF = gl.constexpr(64)


@gluon.jit
def _fetch(keys, values, scales, page, kv_head, k_ring, v_ring, scale_ring, full, stage, there,
           C: gl.constexpr, SCALES: gl.constexpr):  # fmt: skip
    """Asks for a page."""
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * _N * C + 4 * SCALES, pred=there)
    tma.async_copy_global_to_shared(
        keys, [page, kv_head * _N, 0], bar, k_ring.index(stage), pred=there
    )
    tma.async_copy_global_to_shared(
        values, [page, kv_head * C, 0], bar, v_ring.index(stage), pred=there
    )
    tma.async_copy_global_to_shared(scales, [page, 0], bar, scale_ring.index(stage), pred=there)


@gluon.jit
def _fetch_open(open_k, open_v, slot, kv_head, k_ring, v_ring, bar, turn, there,
                C: gl.constexpr):  # fmt: skip
    """Asks for an open page, which takes the place of two others."""
    mbarrier.expect(bar, 4 * _N * C, pred=there)
    at = [slot * _N, kv_head * C]
    k_own = k_ring._reinterpret(open_k.dtype, [k_ring.shape[0] // 2, _N, C], open_k.layout)
    v_own = v_ring._reinterpret(open_v.dtype, [v_ring.shape[0] // 2, _N, C], open_v.layout)
    tma.async_copy_global_to_shared(open_k, at, bar, k_own.index(turn), pred=there)
    tma.async_copy_global_to_shared(open_v, at, bar, v_own.index(turn), pred=there)


@gluon.jit
def _half_operand(ring, stage, half: gl.constexpr):
    """Values of half of the head, [N, h]."""
    page = ring.index(stage).reshape([ring.shape[2], ring.shape[3]])
    return page.slice(half * _HALF, _HALF, dim=0).permute([1, 0])


@gluon.jit
def _heads(rows, first_row, n_rows, kv_head, G: gl.constexpr, SHARED: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """For each row of the tile: which head it is among those of all query rows, and whether it is
    one."""
    m = gl.arange(0, _M, layout=LAYOUT)
    local = m // SHARED
    real = local < n_rows
    row = gl.load(rows + first_row + local, mask=real, other=0)
    return (row * (G * SHARED) + kv_head * SHARED + m % SHARED).to(gl.int64), real


@gluon.jit
def wide_kernel(
    q, keys, values, scales, open_k, open_v, out, partial_o, partial_lse, header, tasks, rows,
    pages, scale, STAGES: gl.constexpr, SCALES: gl.constexpr, G: gl.constexpr,
    SHARED: gl.constexpr, C: gl.constexpr, INT8: gl.constexpr, EARLY: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """One KV head of a task, as `triton_decode.decode_kernel`. Descriptors: `keys` blocks
    [1, N, C], `values` [1, C, N], `scales` [1, SCALES] float32, `open_k`, `open_v` [N, C] of rows
    [S * 64, G * C]."""
    CODE: gl.constexpr = gl.int8 if INT8 else gl.float8e4nv
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32
    LARGEST: gl.constexpr = 127.0 if INT8 else 448.0
    LOG2_LARGEST: gl.constexpr = LOG2_127 - 24.0 if INT8 else LOG2_448
    LOG2_UNIT: gl.constexpr = LOG2_127 if INT8 else LOG2_448
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    MMA16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    P8: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    A16: gl.constexpr = gl.DotOperandLayout(0, MMA16, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    # What one thread has of a row's sum: the four threads of a row add up at the end.
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [_M, 4]
    )
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    FLAT_ROWS: gl.constexpr = gl.SliceLayout(1, FLAT)

    kv_head = gl.program_id(0) % G
    count = gl.load(header + 1 + INDEX)
    stride = gl.load(header)
    task = tasks + gl.program_id(0) // G * _FIELDS
    first_row = gl.load(task)
    n_rows = gl.load(task + 1)
    first_page = gl.load(task + 2)
    n_pages = gl.load(task + 3)
    slot = gl.load(task + 4)
    visible = gl.load(task + 5)
    partial = gl.load(task + 6)
    if gl.program_id(0) >= count * G:
        if EARLY:
            gdc_wait()
        return
    pages += first_page
    k_ring = gl.allocate_shared_memory(CODE, [STAGES, 1, _N, C], keys.layout)
    v_ring = gl.allocate_shared_memory(CODE, [STAGES, 1, C, _N], values.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, SCALES], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    open_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, C], CODE)
    queries = gl.allocate_shared_memory(CODE, [_M, C], QUERIES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(open_full.index(0), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        page = gl.load(pages + gl.maximum(gl.minimum(i, n_pages - 1), 0))
        _fetch(keys, values, scales, page, kv_head, k_ring, v_ring, scale_ring, full, i,
               n_pages > i, C, SCALES)  # fmt: skip
    following = gl.load(pages + gl.maximum(gl.minimum(STAGES, n_pages - 1), 0))
    # The open page takes the place of the two pages that would follow the last, from an even one.
    even = (n_pages + 1) // 2 * 2
    turn = even // 2 % (STAGES // 2)
    head_q, real_q = _heads(rows, first_row, n_rows, kv_head, G, SHARED, FLAT_ROWS)
    c_q = gl.arange(0, C, layout=gl.SliceLayout(0, FLAT))
    if EARLY:
        if INDEX == 0:
            gdc_wait()
        gdc_launch_dependents()
    _fetch_open(open_k, open_v, slot, kv_head, k_ring, v_ring, open_full.index(0), turn,
                (slot >= 0) & (even + 2 <= STAGES), C)  # fmt: skip

    q_MC = gl.load(q + (head_q[:, None] * C + c_q[None, :]), mask=real_q[:, None], other=0.0)
    q_MC = q_MC.to(gl.float32)
    amax = gl.maximum(gl.max(gl.abs(q_MC), 1), 1e-30)
    q_MC = q_MC * (LARGEST / amax)[:, None]
    q8_MC = ((q_MC + ROUND) - ROUND).to(gl.int8) if INT8 else q_MC.to(gl.float8e4nv)
    queries.store(q8_MC)
    q_scale = gl.convert_layout(amax * (scale / LARGEST), ROWS)
    fence_async_shared()
    gl.thread_barrier()

    lower = gl.zeros([_M, _HALF], gl.float32, MMA)
    upper = gl.zeros([_M, _HALF], gl.float32, MMA)
    part = gl.zeros([_M, 4], gl.float32, SUMS)
    base = gl.full([_M], float("-inf"), gl.float32, ROWS)
    if n_pages > 0:
        blank = gl.zeros([_M, _N], SUM, MMA)
        mbarrier.wait(full.index(0), 0)
        k_scale = page_scale(scale_ring, kv_head)
        v_scale = page_scale(scale_ring, G + kv_head)
        s = warpgroup_mma(queries, operand(k_ring, 0), blank, use_acc=False, is_async=True)
        for j in range(n_pages):
            stage = j % STAGES
            s_MN = warpgroup_mma_wait(0, deps=[s])
            factor = q_scale * k_scale
            largest = gl.max(s_MN, 1).to(gl.float32) * factor
            x = s_MN.to(gl.float32) * factor[:, None] + (LOG2_LARGEST - largest)[:, None]
            x = gl.convert_layout(in_value_order(x), P8)
            p, sums = weights(x, INT8)
            low = gl.zeros([_M, _HALF], SUM, MMA)
            low = warpgroup_mma(
                p, _half_operand(v_ring, stage, 0), low, use_acc=False, is_async=True
            )
            if C > _HALF:
                high = gl.zeros([_M, _HALF], SUM, MMA)
                high = warpgroup_mma(
                    p, _half_operand(v_ring, stage, 1), high, use_acc=False, is_async=True
                )
            base = gl.where(j == 0, largest + HEADROOM, base)
            weight = exp2(gl.minimum(largest - base, CAP))
            o_weight = (weight * v_scale)[:, None]
            sums = gl.sum(gl.sum(sums.reshape([_M, 4, 4, 4]), 3), 1).to(gl.float32)
            sums = gl.convert_layout(sums, SUMS, assert_trivial=True)
            part = part + sums * gl.convert_layout(weight, gl.SliceLayout(1, SUMS))[:, None]
            # After the last page this multiplies what is no page: nobody reads the scores.
            then = (j + 1) % STAGES
            mbarrier.wait(full.index(then), (j + 1) // STAGES & 1, pred=j + 1 < n_pages)
            k_scale = page_scale(scale_ring, then * SCALES + kv_head)
            v_scale = page_scale(scale_ring, then * SCALES + G + kv_head)
            s = warpgroup_mma(queries, operand(k_ring, then), s_MN, use_acc=False, is_async=True)
            if C > _HALF:
                low = warpgroup_mma_wait(2, deps=[low])
                lower = lower + low.to(gl.float32) * o_weight
                high = warpgroup_mma_wait(1, deps=[high])
                upper = upper + high.to(gl.float32) * o_weight
            else:
                low = warpgroup_mma_wait(1, deps=[low])
                lower = lower + low.to(gl.float32) * o_weight
            gl.thread_barrier()
            if j + STAGES < n_pages:
                _fetch(keys, values, scales, following, kv_head, k_ring, v_ring, scale_ring, full,
                       stage, True, C, SCALES)  # fmt: skip
            elif (slot >= 0) & (j == even + 1 - STAGES):
                _fetch_open(open_k, open_v, slot, kv_head, k_ring, v_ring, open_full.index(0),
                            turn, True, C)  # fmt: skip
            following = gl.load(pages + gl.minimum(j + 1 + STAGES, n_pages - 1))
        s = warpgroup_mma_wait(0, deps=[s])

    m = gl.arange(0, _M, layout=ROWS)
    total = gl.convert_layout(gl.sum(part, 1), ROWS)
    if slot >= 0:
        head_a, real_a = _heads(rows, first_row, n_rows, kv_head, G, SHARED, gl.SliceLayout(1, A16))
        c_a = gl.arange(0, C, layout=gl.SliceLayout(0, A16))
        q16 = gl.load(q + (head_a[:, None] * C + c_a[None, :]), mask=real_a[:, None], other=0.0)
        mbarrier.wait(open_full.index(0), 0)
        k_own = k_ring._reinterpret(open_k.dtype, [STAGES // 2, _N, C], open_k.layout).index(turn)
        v_own = v_ring._reinterpret(open_v.dtype, [STAGES // 2, _N, C], open_v.layout).index(turn)
        tokens = visible + n_rows - 1
        if tokens < _N:
            # Later rows may hold anything, also what zero weights do not silence.
            v = v_own.load(FLAT)
            t_v = gl.arange(0, _N, layout=FLAT_ROWS)
            v_own.store(gl.where((t_v < tokens)[:, None], v, gl.zeros_like(v)))
            fence_async_shared()
            gl.thread_barrier()
        zero = gl.zeros([_M, _N], gl.float32, MMA16)
        s16 = warpgroup_mma(q16, k_own.permute([1, 0]), zero, use_acc=False, is_async=True)
        s16 = warpgroup_mma_wait(0, deps=[s16])
        t = gl.arange(0, _N, layout=gl.SliceLayout(0, MMA16))
        shown = gl.convert_layout(visible + m // SHARED, gl.SliceLayout(1, MMA16))
        x16 = gl.where(t[None, :] < shown[:, None], s16 * scale, float("-inf"))
        top16 = gl.max(x16, 1)
        p16 = exp2(x16 - top16[:, None]).to(q16.dtype)
        top = gl.convert_layout(top16, ROWS)
        base = gl.where(n_pages == 0, top + HEADROOM, base)
        weight = exp2(gl.minimum(top - base, CAP)) * LARGEST
        total = total + gl.convert_layout(gl.sum(p16.to(gl.float32), 1), ROWS) * weight
        p16 = gl.convert_layout(p16, A16)
        o16 = warpgroup_mma(p16, v_own.slice(0, _HALF, dim=1), zero, use_acc=False, is_async=True)
        o16 = warpgroup_mma_wait(0, deps=[o16])
        lower = lower + gl.convert_layout(o16, MMA) * weight[:, None]
        if C > _HALF:
            o16 = warpgroup_mma(
                p16, v_own.slice(_HALF, _HALF, dim=1), zero, use_acc=False, is_async=True
            )
            o16 = warpgroup_mma_wait(0, deps=[o16])
            upper = upper + gl.convert_layout(o16, MMA) * weight[:, None]

    share = (1.0 / total)[:, None]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head_o, real_o = _heads(rows, first_row, n_rows, kv_head, G, SHARED, gl.SliceLayout(1, OUT))
    if partial < 0:
        to = out + head_o[:, None] * C
    else:
        first = (partial + kv_head * stride).to(gl.int64)
        lse = base + (gl.log2(total) - LOG2_UNIT)
        gl.store(partial_lse + first + m, lse, mask=m // SHARED < n_rows)
        to = partial_o + (first + gl.arange(0, _M, layout=gl.SliceLayout(1, OUT)))[:, None] * C
    to = to + gl.arange(0, _HALF, layout=gl.SliceLayout(0, OUT))[None, :]
    gl.store(to, gl.convert_layout((lower * share).to(out.dtype.element_ty), OUT), real_o[:, None])
    if C > _HALF:
        gl.store(
            to + _HALF, gl.convert_layout((upper * share).to(out.dtype.element_ty), OUT),
            real_o[:, None],
        )  # fmt: skip
    if EARLY and INDEX > 0:
        gdc_wait()

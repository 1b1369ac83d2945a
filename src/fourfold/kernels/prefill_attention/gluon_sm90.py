"""Attention of prompt chunks over 8-bit pages on Hopper: one producer warp, two warpgroups.

A program owns two subtiles of 64 rows (tokens times the query heads that share a KV head), each
inside one page, hence every page before it is used whole and unmasked. The producer fetches pages
by TMA; each warpgroup multiplies 64 rows by one page at a time with its queries and weights in
registers as the left operand (`VALUE_ORDER` makes the scores' registers those of the weights).
Nothing orders the two: exponentials of one may run beside products of the other.

Two things differ from the usual loop. Pages have their own maxima (the weights of a page are
rounded relative to the page's largest), so nothing is rescaled when a larger maximum appears: all
pages are weighted against the maximum of the row's own page, with room for 2 ** 145 above it in
float32; a page beyond that is capped. And a page's int32 product joins the float32 sum with
one conversion and one multiply-add per element.

Shapes: T rows, H query heads, G KV heads, C head width, P pages, N = 64 tokens per page, R = 64
rows of a subtile.
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

_N = gl.constexpr(64)
_R = gl.constexpr(64)


@gluon.jit
def _produce(
    keys, values, scales, own_k, own_v, table_ptr, k_ring, v_ring, scale_ring, own_ring,
    full, empty, own_full, pages, kv_head, row0, own0, own1, STAGES: gl.constexpr,
    C: gl.constexpr, SCALES: gl.constexpr, ROW_BYTES: gl.constexpr,
):  # fmt: skip
    for sub in gl.static_range(2):
        row = row0 + (own0 if sub == 0 else own1)
        bar = own_full.index(sub)
        mbarrier.expect(bar, 2 * _N * ROW_BYTES)
        tma.async_copy_global_to_shared(own_k, [row, kv_head * C], bar, own_ring.index(2 * sub))
        tma.async_copy_global_to_shared(own_v, [row, kv_head * C], bar, own_ring.index(2 * sub + 1))
    for j in range(pages):
        stage = j % STAGES
        page = gl.load(table_ptr + j)
        mbarrier.wait(empty.index(stage), ((j // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * _N * C + 4 * SCALES)
        tma.async_copy_global_to_shared(keys, [page, kv_head * _N, 0], bar, k_ring.index(stage))
        tma.async_copy_global_to_shared(values, [page, kv_head * C, 0], bar, v_ring.index(stage))
        tma.async_copy_global_to_shared(scales, [page, 0], bar, scale_ring.index(stage))


@gluon.jit
def _consume(
    q_ptr, out_ptr, k_ring, v_ring, scale_ring, own_ring, full, empty, own_full,
    row0, length, own_start, first, n, pages, kv_head, q_stride, scale_log2, SUB: gl.constexpr,
    STAGES: gl.constexpr, SCALES: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr,
    HEADS: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """One subtile. `first` is its first token in the chunk, `own_start` the first token of the page
    it lies in, `n` the pages before that one, `pages` what the producer fetches for both."""
    QH: gl.constexpr = H // G
    S_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _N, 32])
    O_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    S16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _N, 16])
    O16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    Q16: gl.constexpr = gl.DotOperandLayout(0, S16, 2)
    P16: gl.constexpr = gl.DotOperandLayout(0, O16, 2)
    Q8: gl.constexpr = gl.DotOperandLayout(0, S_MMA, 4)
    P8: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 4)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_MMA)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_MMA)
    # What one thread has of a row's sum: the four threads of a row add up at the end.
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [_R, 4]
    )
    LARGEST: gl.constexpr = 127.0 if INT8 else 448.0
    LOG2_LARGEST: gl.constexpr = LOG2_127 - 24.0 if INT8 else LOG2_448
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32

    # The own page, in 16 bits.
    r_q = gl.arange(0, _R, layout=gl.SliceLayout(1, Q16))
    c_q = gl.arange(0, C, layout=gl.SliceLayout(0, Q16))
    token = first + r_q // HEADS
    ok = (token < length) & (r_q % HEADS < QH)
    at = (row0 + token) * q_stride + (kv_head * QH + r_q % HEADS) * C
    q16 = gl.load(q_ptr + (at[:, None] + c_q[None, :]), mask=ok[:, None], other=0.0)
    mbarrier.wait(own_full.index(SUB), 0)
    own_v = own_ring.index(2 * SUB + 1)
    if length - own_start < _N:
        # Rows after the chunk may hold anything, also what zero weights do not silence.
        flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C, C // 8], [4, 1], [1, 0])
        v = own_v.load(flat)
        n_v = gl.arange(0, _N, layout=gl.SliceLayout(1, flat))
        v = gl.where((n_v < length - own_start)[:, None], v, gl.zeros_like(v))
        own_v.store(v)
        fence_async_shared()
        gl.thread_barrier()
    zero = gl.zeros([_R, _N], gl.float32, S16)
    s16 = warpgroup_mma(
        q16, own_ring.index(2 * SUB).permute([1, 0]), zero, use_acc=False, is_async=True
    )
    s16 = warpgroup_mma_wait(0, deps=[s16])
    r_s = gl.arange(0, _R, layout=gl.SliceLayout(1, S16))
    n_s = gl.arange(0, _N, layout=gl.SliceLayout(0, S16))
    seen = n_s[None, :] <= (first - own_start + r_s // HEADS)[:, None]
    s16 = gl.where(seen, s16 * scale_log2, float("-inf"))
    m16 = gl.max(s16, 1)
    p16 = exp2(s16 - m16[:, None]).to(q16.dtype)
    own_sum = gl.sum(p16.to(gl.float32), 1) * (LARGEST * 2.0**-HEADROOM)
    p16 = gl.convert_layout(p16, P16)
    o16 = gl.zeros([_R, C], gl.float32, O16)
    o16 = warpgroup_mma(p16, own_v, o16, use_acc=False, is_async=True)
    o16 = warpgroup_mma_wait(0, deps=[o16])
    o = gl.convert_layout(o16, O_MMA) * (LARGEST * 2.0**-HEADROOM)
    base = gl.convert_layout(m16, S_ROWS) + HEADROOM

    # Quantised queries.
    r_8 = gl.arange(0, _R, layout=gl.SliceLayout(1, Q8))
    c_8 = gl.arange(0, C, layout=gl.SliceLayout(0, Q8))
    token = first + r_8 // HEADS
    ok = (token < length) & (r_8 % HEADS < QH)
    at = (row0 + token) * q_stride + (kv_head * QH + r_8 % HEADS) * C
    q = gl.load(q_ptr + (at[:, None] + c_8[None, :]), mask=ok[:, None], other=0.0).to(gl.float32)
    amax = gl.maximum(gl.max(gl.abs(q), 1), 1e-30)
    q = q * (LARGEST / amax)[:, None]
    q8 = ((q + ROUND) - ROUND).to(gl.int8) if INT8 else q.to(gl.float8e4nv)
    q_scale = gl.convert_layout(amax * (scale_log2 / LARGEST), S_ROWS)

    part = gl.zeros([_R, 4], gl.float32, SUMS)
    if n > 0:
        mbarrier.wait(full.index(0), 0)
        k_scale = page_scale(scale_ring, kv_head)
        v_scale = page_scale(scale_ring, G + kv_head)
        blank = gl.zeros([_R, _N], SUM, S_MMA)
        s = warpgroup_mma(q8, operand(k_ring, 0), blank, use_acc=False, is_async=True)
        for j in range(n):
            stage = j % STAGES
            s_RN = warpgroup_mma_wait(0, deps=[s])
            factor = q_scale * k_scale
            largest = gl.max(s_RN, 1).to(gl.float32) * factor
            x = s_RN.to(gl.float32) * factor[:, None] + (LOG2_LARGEST - largest)[:, None]
            x = gl.convert_layout(in_value_order(x), P8)
            weight = exp2(gl.minimum(largest - base, CAP))
            p, sums = weights(x, INT8)
            acc = gl.zeros([_R, C], SUM, O_MMA)
            acc = warpgroup_mma(p, operand(v_ring, stage), acc, use_acc=False, is_async=True)
            if j + 1 < n:
                mbarrier.wait(full.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1)
            o_weight = weight * v_scale
            k_scale = page_scale(scale_ring, (j + 1) % STAGES * SCALES + kv_head)
            v_scale = page_scale(scale_ring, (j + 1) % STAGES * SCALES + G + kv_head)
            # After the last page this multiplies what is no page: nobody reads the scores.
            s = warpgroup_mma(
                q8, operand(k_ring, (j + 1) % STAGES), s_RN, use_acc=False, is_async=True
            )
            sums = gl.sum(gl.sum(sums.reshape([_R, 4, 4, 4]), 3), 1).to(gl.float32)
            sums = gl.convert_layout(sums, SUMS, assert_trivial=True)
            part = part + sums * gl.convert_layout(weight, gl.SliceLayout(1, SUMS))[:, None]
            acc = warpgroup_mma_wait(1, deps=[acc])
            o_weight = gl.convert_layout(o_weight, O_ROWS)
            o = o + acc.to(gl.float32) * o_weight[:, None]
            mbarrier.arrive(empty.index(stage))
        s = warpgroup_mma_wait(0, deps=[s])
    for j in range(n, pages):
        mbarrier.wait(full.index(j % STAGES), (j // STAGES) & 1)
        mbarrier.arrive(empty.index(j % STAGES))

    total = gl.convert_layout(gl.sum(part, 1), O_ROWS) + gl.convert_layout(own_sum, O_ROWS)
    o = o * (1.0 / total)[:, None]
    r_o = gl.arange(0, _R, layout=O_ROWS)
    c_o = gl.arange(0, C, layout=gl.SliceLayout(0, O_MMA))
    token = first + r_o // HEADS
    ok = (token < length) & (r_o % HEADS < QH)
    at = ((row0 + token) * H + kv_head * QH + r_o % HEADS) * C
    gl.store(out_ptr + (at[:, None] + c_o[None, :]), o.to(q16.dtype), mask=ok[:, None])


@gluon.jit(do_not_specialize=["table_width"])
def prefill_kernel(
    q_ptr, out_ptr, keys, values, scales, own_k, own_v, tile_ptr, start_ptr, length_ptr,
    prefix_ptr, table_ptr, table_width, q_stride, scale_log2, STAGES: gl.constexpr,
    SCALES: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HEADS: gl.constexpr,
    INT8: gl.constexpr,
):  # fmt: skip
    """One tile of two subtiles for one KV head; grid (tiles * G). Descriptors: `keys` blocks
    [1, N, C], `values` [1, C, N], `scales` [1, SCALES] float32, `own_k`, `own_v` [N, C] of rows
    [T, G * C]. HEADS: query heads of a KV head, rounded up to a power of two."""
    CODE: gl.constexpr = gl.int8 if INT8 else gl.float8e4nv
    tile, kv_head = gl.program_id(0) // G, gl.program_id(0) % G
    chunk = gl.load(tile_ptr + 2 * tile)
    first0 = gl.load(tile_ptr + 2 * tile + 1)
    row0 = gl.load(start_ptr + chunk)
    length = gl.load(length_ptr + chunk)
    prefix = gl.load(prefix_ptr + chunk)
    first1 = first0 + _R // HEADS
    own0, own1 = first0 // _N * _N, first1 // _N * _N
    n0 = prefix + first0 // _N
    n1 = prefix + first1 // _N
    if first1 >= length:
        n1 = 0
    pages = gl.maximum(n0, n1)

    k_ring = gl.allocate_shared_memory(CODE, [STAGES, 1, _N, C], keys.layout)
    v_ring = gl.allocate_shared_memory(CODE, [STAGES, 1, C, _N], values.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, SCALES], scales.layout)
    own_ring = gl.allocate_shared_memory(own_k.dtype, [4, _N, C], own_k.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for sub in gl.static_range(2):
        mbarrier.init(own_full.index(sub), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_ptr, out_ptr, k_ring, v_ring, scale_ring, own_ring, full, empty, own_full,
                    row0, length, own0, first0, n0, pages, kv_head, q_stride, scale_log2, 0,
                    STAGES, SCALES, C, H, G, HEADS, INT8,
                ),
            ),
            (
                _consume,
                (
                    q_ptr, out_ptr, k_ring, v_ring, scale_ring, own_ring, full, empty, own_full,
                    row0, length, own1, first1, n1, pages, kv_head, q_stride, scale_log2, 1,
                    STAGES, SCALES, C, H, G, HEADS, INT8,
                ),
            ),
            (
                _produce,
                (
                    keys, values, scales, own_k, own_v, table_ptr + chunk * table_width, k_ring,
                    v_ring, scale_ring, own_ring, full, empty, own_full, pages, kv_head, row0,
                    own0, own1, STAGES, C, SCALES, 2 * C,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

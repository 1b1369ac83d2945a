"""Decode attention over 8-bit pages: one program a task of the plan. Wide tiles on Hopper have a
kernel of their own (`gluon_sm90`).

A task is a tile of query rows that share one KV head, a run of sealed pages, and perhaps the page
its sequence is still filling. Both products run on 8-bit tensor cores.

Where programs are many, one with a tile of 16 rows is a single warp: nothing has to be exchanged
between warps, and several programs an SM keep enough reads in flight. Weights go from the first
product's accumulator to the second product's operand without leaving their registers, because
values lie in `VALUE_ORDER`. Where programs are few, each is waited for: several warps share the
work on a page, and a task's first page and open page are read while the kernel before still runs.

Integers become floats for nothing: a sum that starts at the bits of 1.5 * 2^23 is, read as a float,
1.5 * 2^23 plus the sum, as long as its magnitude stays below 2^22.

Shapes: M query rows of a tile, N = 64 tokens per page, C head width, T tokens of a step over the
open page.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.decode_attention.plan import TASK_FIELDS

_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC_BITS_OF_64 = tl.constexpr(0x30000000)  # -64 * _MAGIC_BITS modulo 2^32
_TOKENS = tl.constexpr(64)
_HALF = tl.constexpr(64)
_FIELDS = tl.constexpr(TASK_FIELDS)
# Pages of a task that are asked for ahead of their use, where programs are few.
_AHEAD = tl.constexpr(4)


@triton.jit
def _weighted(p8_MN, v8_hN, FP8: tl.constexpr):
    """Sums of weights times values, float32 [M, h]."""
    if FP8:
        return tl.dot(p8_MN, v8_hN.T, out_dtype=tl.float32)
    start_Mh = tl.full((p8_MN.shape[0], _HALF), _MAGIC_BITS, tl.int32)
    sum_Mh = tl.dot(p8_MN, v8_hN.T, start_Mh, out_dtype=tl.int32)
    return sum_Mh.to(tl.float32, bitcast=True) - _MAGIC


@triton.jit
def _load_page(records, scales, page, there, kv_head,
               RECORD: tl.constexpr, G: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Keys [N, C], both halves of the values [h, N] and the scales of a page. Codes are undefined
    unless it is `there`; a width of 64 has one half, given twice."""
    n_N = tl.arange(0, _TOKENS)
    h_h = tl.arange(0, _HALF)
    k_NC = kv_head * (_TOKENS * C) + n_N[:, None] * C + tl.arange(0, C)[None, :]
    v_hN = (G + kv_head) * (_TOKENS * C) + h_h[:, None] * _TOKENS + n_N[None, :]
    record = records + page * RECORD
    k8_NC = tl.load(record + k_NC, mask=there)
    v8_hN = tl.load(record + v_hN, mask=there)
    w8_hN = v8_hN
    if C > _HALF:
        w8_hN = tl.load(record + v_hN + _HALF * _TOKENS, mask=there)
    at = scales + page * (RECORD // 4)
    return k8_NC, v8_hN, w8_hN, tl.load(at), tl.load(at + G)


@triton.jit
def _sums(weight_MN, FP8: tl.constexpr):
    """Sums of a page's weights [M]; of integers by their bits."""
    if FP8:
        return tl.sum(weight_MN, 1)
    return (tl.sum(weight_MN, 1) + _MAGIC_BITS_OF_64).to(tl.float32) * (1.0 / 127.0)


@triton.jit
def _attend_page(q8_MC, step_M, k8_NC, v8_hN, w8_hN, k_scale, v_scale, o_Mh, u_Mh, l_M, top_M,
                 M: tl.constexpr, C: tl.constexpr, FP8: tl.constexpr,
                 FEW: tl.constexpr):  # fmt: skip
    """The state (o, l, top) grows by a sealed page."""
    factor_M = step_M * k_scale
    if FP8:
        s_MN = tl.dot(q8_MC, k8_NC.T, out_dtype=tl.float32)
        largest_M = tl.max(s_MN, 1)
        weight_MN = tl.exp2((s_MN - largest_M[:, None]) * factor_M[:, None])
        p8_MN = (weight_MN * 448.0).to(q8_MC.dtype)
        page_top_M = largest_M * factor_M
        largest_code = 448.0
    else:
        start_MN = tl.full((M, _TOKENS), _MAGIC_BITS, tl.int32)
        s_MN = tl.dot(q8_MC, k8_NC.T, start_MN, out_dtype=tl.int32)
        s_MN = s_MN.to(tl.float32, bitcast=True)
        largest_M = tl.max(s_MN, 1)
        weight_MN = tl.exp2((s_MN - largest_M[:, None]) * factor_M[:, None])
        weight_MN = (weight_MN * 127.0 + _MAGIC).to(tl.int32, bitcast=True)
        p8_MN = weight_MN.to(tl.int8)
        page_top_M = (largest_M - _MAGIC) * factor_M
        largest_code = 127.0
    # Few programs wait for sums at the end only; many lack registers to keep weights until then.
    if not FEW:
        sum_M = _sums(weight_MN, FP8)
    p8_MN = p8_MN.reshape(M, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, _TOKENS)
    new_top_M = tl.maximum(top_M, page_top_M)
    keep_M = tl.exp2(top_M - new_top_M)
    take_M = tl.exp2(page_top_M - new_top_M)
    take_v_M = take_M * (v_scale / largest_code)
    o_Mh = o_Mh * keep_M[:, None] + _weighted(p8_MN, v8_hN, FP8) * take_v_M[:, None]
    if C > _HALF:
        u_Mh = u_Mh * keep_M[:, None] + _weighted(p8_MN, w8_hN, FP8) * take_v_M[:, None]
    if FEW:
        sum_M = _sums(weight_MN, FP8)
    return o_Mh, u_Mh, l_M * keep_M + sum_M * take_M, new_top_M


@triton.jit
def _attend_sealed(q8_MC, step_M, records, scales, pages, n_pages, kv_head, k_scale, v_scale,
                   o_Mh, u_Mh, l_M, top_M,
                   RECORD: tl.constexpr, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
                   FP8: tl.constexpr, STAGES: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """Attends to `n_pages` sealed pages, which the compiler brings to shared memory some pages
    ahead. `k_scale` and `v_scale` belong to the first."""
    n_N = tl.arange(0, _TOKENS)
    c_C = tl.arange(0, C)
    k_NC = kv_head * (_TOKENS * C) + n_N[:, None] * C + c_C[None, :]
    h_h = tl.arange(0, _HALF)
    v_hN = (G + kv_head) * (_TOKENS * C) + h_h[:, None] * _TOKENS + n_N[None, :]
    for i in tl.range(0, n_pages, num_stages=STAGES):
        page = tl.load(pages + i).to(tl.int64)
        k8_NC = tl.load(records + page * RECORD + k_NC)
        v8_hN = tl.load(records + page * RECORD + v_hN)
        w8_hN = v8_hN
        if C > _HALF:
            w8_hN = tl.load(records + page * RECORD + v_hN + _HALF * _TOKENS)
        # The next page's scales are asked for a page ahead: they would be waited for otherwise.
        following = tl.load(pages + tl.minimum(i + 1, n_pages - 1)).to(tl.int64)
        at = scales + following * (RECORD // 4)
        next_k_scale = tl.load(at)
        next_v_scale = tl.load(at + G)
        o_Mh, u_Mh, l_M, top_M = _attend_page(
            q8_MC, step_M, k8_NC, v8_hN, w8_hN, k_scale, v_scale, o_Mh, u_Mh, l_M, top_M,
            M, C, FP8, FEW,
        )  # fmt: skip
        k_scale = next_k_scale
        v_scale = next_v_scale
    return o_Mh, u_Mh, l_M, top_M


@triton.jit
def _load_tokens(open_k, open_v, slot, t_T, begin, end, kv_head, k_TC, v_Th, w_Th,
                 G: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Keys and both halves of the values of those tokens `t_T` of an open page that are among
    `begin` to `end` - 1; of the others what is given."""
    at_T1 = ((slot * _TOKENS + t_T) * G + kv_head)[:, None] * C
    wanted_T1 = ((t_T >= begin) & (t_T < end))[:, None]
    h_h = tl.arange(0, _HALF)
    k_TC = tl.load(open_k + at_T1 + tl.arange(0, C)[None, :], mask=wanted_T1, other=k_TC)
    v_Th = tl.load(open_v + at_T1 + h_h[None, :], mask=wanted_T1, other=v_Th)
    if C > _HALF:
        w_Th = tl.load(open_v + at_T1 + _HALF + h_h[None, :], mask=wanted_T1, other=w_Th)
    return k_TC, v_Th, w_Th


@triton.jit
def _attend_tokens(q_MC, scale, k_TC, v_Th, w_Th, t_T, shown_M, o_Mh, u_Mh, l_M, top_M,
                   C: tl.constexpr):  # fmt: skip
    """The state grows by tokens `t_T` of an open page, of which row m sees the first
    `shown_M[m]`."""
    x_MT = tl.dot(q_MC, k_TC.T) * scale
    x_MT = tl.where(t_T[None, :] < shown_M[:, None], x_MT, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(x_MT, 1))
    keep_M = tl.exp2(top_M - new_top_M)
    p_MT = tl.exp2(x_MT - new_top_M[:, None]).to(q_MC.dtype)
    l_M = l_M * keep_M + tl.sum(p_MT.to(tl.float32), 1)
    o_Mh = tl.dot(p_MT, v_Th, o_Mh * keep_M[:, None])
    if C > _HALF:
        u_Mh = tl.dot(p_MT, w_Th, u_Mh * keep_M[:, None])
    return o_Mh, u_Mh, l_M, new_top_M


@triton.jit
def _attend_open(q_MC, scale, open_k, open_v, slot, shown_M, tokens, kv_head, o_Mh, u_Mh, l_M,
                 top_M, G: tl.constexpr, C: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Attends to the first `tokens` tokens of an open page, row m to the first `shown_M[m]`."""
    for start in tl.range(0, tokens, T, num_stages=3):
        t_T = start + tl.arange(0, T)
        k_TC, v_Th, w_Th = _load_tokens(
            open_k, open_v, slot, t_T, 0, tokens, kv_head, 0.0, 0.0, 0.0, G, C
        )
        o_Mh, u_Mh, l_M, top_M = _attend_tokens(
            q_MC, scale, k_TC, v_Th, w_Th, t_T, shown_M, o_Mh, u_Mh, l_M, top_M, C
        )
    return o_Mh, u_Mh, l_M, top_M


@triton.jit
def _prefetch(pointers):
    """Asks for the lines at `pointers` to be brought to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _arrived(tile, EARLY: tl.constexpr):
    """The same tile. Without it the compiler would rearrange a tile, and so wait for it, where it
    is loaded."""
    if not EARLY:
        return tile
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False,
        pack=32 // tile.dtype.primitive_bitwidth,
    )  # fmt: skip


@triton.jit
def _prefetch_pages(records, pages, n_pages, kv_head, RECORD: tl.constexpr, G: tl.constexpr,
                    C: tl.constexpr):  # fmt: skip
    """The same for keys and values of the first few pages of a task."""
    page_A = tl.load(pages + tl.minimum(tl.arange(0, _AHEAD), n_pages - 1)).to(tl.int64)
    line = tl.arange(0, 2 * _TOKENS * C // 128)
    values = line >= _TOKENS * C // 128
    at = kv_head * (_TOKENS * C) + line * 128 + tl.where(values, (G - 1) * _TOKENS * C, 0)
    _prefetch(records + page_A[:, None] * RECORD + at[None, :])


@triton.jit
def decode_kernel(q, records, scales, open_k, open_v, out, partial_o, partial_lse,
                  header, tasks, rows, pages, scale,
                  RECORD: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr,
                  NEW: tl.constexpr, M: tl.constexpr, FP8: tl.constexpr, STAGES: tl.constexpr,
                  T: tl.constexpr, EARLY: tl.constexpr, FEW: tl.constexpr,
                  INDEX: tl.constexpr):  # fmt: skip
    """One KV head of a task. `scale` includes log2(e); `scales` are the records as float32.

    `INDEX`: the place of the tile among those of the capacity. `EARLY`: kernels overlap the end of
    those before them (programmatic dependent launch). The first waits for whoever made its inputs;
    the others start beside it, and wait for it at their end, so that the merge, which waits for the
    last, waits for all. `FEW`: there are so few programs that each is waited for. Sealed pages, and
    all but the `NEW` last tokens of the open page, are older than the kernel before this one, so
    their first reads do not wait for it.
    """
    kv_head = tl.program_id(0) % G
    count = tl.load(header + 1 + INDEX)
    stride = tl.load(header)
    task = tasks + tl.program_id(0) // G * _FIELDS
    first_row = tl.load(task)
    n_rows = tl.load(task + 1)
    first_page = tl.load(task + 2)
    n_pages = tl.load(task + 3)
    slot = tl.load(task + 4)
    visible = tl.load(task + 5)
    partial = tl.load(task + 6)
    if tl.program_id(0) >= count * G:
        if EARLY:
            gdc_wait()
        return
    pages += first_page
    m_M = tl.arange(0, M)
    local_M = m_M // SHARED
    real_M = local_M < n_rows
    row_M = tl.load(rows + first_row + local_M, mask=real_M, other=0)
    page = tl.load(pages).to(tl.int64)
    scales += 2 * G * _TOKENS * C // 4 + kv_head
    tokens = tl.where(slot >= 0, visible + n_rows - 1, 0)
    t_T = tl.arange(0, _TOKENS)
    if FEW:
        older = tl.minimum(visible - NEW, tokens)
        k_TC, v_Th, w_Th = _load_tokens(
            open_k, open_v, slot, t_T, 0, older, kv_head, 0.0, 0.0, 0.0, G, C
        )
        k8_NC, v8_hN, w8_hN, k_scale, v_scale = _load_page(
            records, scales, page, n_pages > 0, kv_head, RECORD, G, C
        )
        second = tl.load(pages + tl.maximum(tl.minimum(1, n_pages - 1), 0)).to(tl.int64)
        second_k_scale = tl.load(scales + second * (RECORD // 4))
        second_v_scale = tl.load(scales + second * (RECORD // 4) + G)
        if EARLY and n_pages > 1:
            _prefetch_pages(records, pages, n_pages, kv_head, RECORD, G, C)
    if EARLY:
        if INDEX == 0:
            gdc_wait()
        gdc_launch_dependents()

    head_M = row_M * (G * SHARED) + kv_head * SHARED + m_M % SHARED
    c_C = tl.arange(0, C)
    at_MC = head_M.to(tl.int64)[:, None] * C + c_C[None, :]
    q_MC = tl.load(q + at_MC, mask=real_M[:, None], other=0.0)
    if FEW:
        k_TC, v_Th, w_Th = _load_tokens(
            open_k, open_v, slot, t_T, older, tokens, kv_head, k_TC, v_Th, w_Th, G, C
        )
        k8_NC = _arrived(k8_NC, EARLY)
        v8_hN = _arrived(v8_hN, EARLY)
        if C > _HALF:
            w8_hN = _arrived(w8_hN, EARLY)
    else:
        k_scale = tl.load(scales + page * (RECORD // 4))
        v_scale = tl.load(scales + page * (RECORD // 4) + G)

    wide_MC = q_MC.to(tl.float32)
    largest_M = tl.maximum(tl.max(tl.abs(wide_MC), 1), 1e-30)
    if FP8:
        q8_MC = (wide_MC * (448.0 / largest_M)[:, None]).to(records.dtype.element_ty)
        step_M = largest_M * (scale / 448.0)
    else:
        codes_MC = wide_MC * (127.0 / largest_M)[:, None] + _MAGIC
        q8_MC = codes_MC.to(tl.int32, bitcast=True).to(tl.int8)
        step_M = largest_M * (scale / 127.0)

    o_Mh = tl.zeros((M, _HALF), tl.float32)
    u_Mh = tl.zeros((M, _HALF), tl.float32)
    l_M = tl.zeros((M,), tl.float32)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    if FEW:
        if n_pages > 0:
            o_Mh, u_Mh, l_M, top_M = _attend_page(
                q8_MC, step_M, k8_NC, v8_hN, w8_hN, k_scale, v_scale, o_Mh, u_Mh, l_M, top_M,
                M, C, FP8, FEW,
            )  # fmt: skip
        if n_pages > 1:
            o_Mh, u_Mh, l_M, top_M = _attend_sealed(
                q8_MC, step_M, records, scales, pages + 1, n_pages - 1, kv_head,
                second_k_scale, second_v_scale, o_Mh, u_Mh, l_M, top_M,
                RECORD, G, M, C, FP8, STAGES, FEW,
            )  # fmt: skip
        if slot >= 0:
            k_TC = _arrived(k_TC, EARLY)
            v_Th = _arrived(v_Th, EARLY)
            if C > _HALF:
                w_Th = _arrived(w_Th, EARLY)
            o_Mh, u_Mh, l_M, top_M = _attend_tokens(
                q_MC, scale, k_TC, v_Th, w_Th, t_T, visible + local_M,
                o_Mh, u_Mh, l_M, top_M, C,
            )  # fmt: skip
    else:
        o_Mh, u_Mh, l_M, top_M = _attend_sealed(
            q8_MC, step_M, records, scales, pages, n_pages, kv_head, k_scale, v_scale,
            o_Mh, u_Mh, l_M, top_M, RECORD, G, M, C, FP8, STAGES, FEW,
        )  # fmt: skip
        if slot >= 0:
            o_Mh, u_Mh, l_M, top_M = _attend_open(
                q_MC, scale, open_k, open_v, slot, visible + local_M, tokens, kv_head,
                o_Mh, u_Mh, l_M, top_M, G, C, T,
            )  # fmt: skip
    h_h = tl.arange(0, _HALF)
    if partial < 0:
        to_Mh = out + head_M.to(tl.int64)[:, None] * C + h_h[None, :]
    else:
        to_M = (partial + kv_head * stride).to(tl.int64) + m_M
        to_Mh = partial_o + to_M[:, None] * C + h_h[None, :]
        tl.store(partial_lse + to_M, top_M + tl.log2(l_M), mask=real_M)
    share_M = 1.0 / l_M
    tl.store(to_Mh, (o_Mh * share_M[:, None]).to(q_MC.dtype), mask=real_M[:, None])
    if C > _HALF:
        tl.store(to_Mh + _HALF, (u_Mh * share_M[:, None]).to(q_MC.dtype), mask=real_M[:, None])
    if EARLY and INDEX > 0:
        gdc_wait()

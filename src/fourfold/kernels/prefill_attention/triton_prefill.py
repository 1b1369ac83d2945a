"""Attention of prompt chunks over 8-bit pages, for GPUs without a kernel of their own.

One program is one subtile: 64 rows (tokens times the query heads that share a KV head) of one page.
Every page before it is used whole, in 8 bits and unmasked; its own page in 16 bits. Pages have
their own maxima (weights are rounded relative to the page's largest) and are weighted against the
maximum of the row's own page, so that nothing is ever rescaled; float32 leaves room for 2 ** 145
above it.

Shapes: T rows, H query heads, G KV heads, C head width, N = 64 tokens per page, R = 64 rows.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

_N = tl.constexpr(64)
_R = tl.constexpr(64)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no bits for a fraction
_HEADROOM = tl.constexpr(60.0)
_CAP = tl.constexpr(85.0)


@triton.jit
def _in_value_order(p_RN):
    """Columns of every 16 as `VALUE_ORDER` has them."""
    return p_RN.reshape(_R, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(_R, _N)


@triton.jit
def _own_page(q_RC, k_ptr, v_ptr, n_N, filled, place_R, scale_log2, C: tl.constexpr):
    """Rows over the 16-bit page they are in: values, sum of weights, maximum."""
    c_C = tl.arange(0, C)
    k_NC = tl.load(k_ptr + c_C[None, :], mask=filled[:, None], other=0.0)
    v_NC = tl.load(v_ptr + c_C[None, :], mask=filled[:, None], other=0.0)
    x_RN = tl.dot(q_RC, k_NC.T) * scale_log2
    x_RN = tl.where(n_N[None, :] <= place_R[:, None], x_RN, float("-inf"))
    top_R = tl.max(x_RN, 1)
    p_RN = tl.exp2(x_RN - top_R[:, None]).to(q_RC.dtype)
    return tl.dot(p_RN, v_NC), tl.sum(p_RN.to(tl.float32), 1), top_R


@triton.jit(do_not_specialize=["table_width"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, code_ptr, scale_ptr, tile_ptr, start_ptr, length_ptr, prefix_ptr,
    table_ptr, table_width, q_stride, k_stride, v_stride, scale_log2, RECORD: tl.constexpr,
    STAGES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    SUBTILES: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * subtiles * G)."""
    QH: tl.constexpr = H // G
    TOKENS: tl.constexpr = _R // HEADS
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    kv_head = tl.program_id(0) % G
    subtile = tl.program_id(0) // G
    tile = tile_ptr + subtile // SUBTILES * 2
    chunk = tl.load(tile)
    first = tl.load(tile + 1) + subtile % SUBTILES * TOKENS
    length = tl.load(length_ptr + chunk)
    if first < length:
        row0 = tl.load(start_ptr + chunk).to(tl.int64)
        pages = table_ptr + chunk * table_width
        own = first // _N * _N
        n_pages = tl.load(prefix_ptr + chunk) + first // _N
        r_R = tl.arange(0, _R)
        n_N = tl.arange(0, _N)
        c_C = tl.arange(0, C)
        token_R = first + r_R // HEADS
        head_R = kv_head * QH + r_R % HEADS
        ok_R = (token_R < length) & (r_R % HEADS < QH)
        q_at = (row0 + token_R)[:, None] * q_stride + head_R[:, None] * C + c_C[None, :]
        q_RC = tl.load(q_ptr + q_at, mask=ok_R[:, None], other=0.0)

        rows_N = (row0 + own + n_N)[:, None]
        o_RC, sum_R, top_R = _own_page(
            q_RC, k_ptr + rows_N * k_stride + kv_head * C, v_ptr + rows_N * v_stride + kv_head * C,
            n_N, own + n_N < length, token_R - own, scale_log2, C,
        )  # fmt: skip
        o_RC *= LARGEST * 2.0**-_HEADROOM
        sum_R *= LARGEST * 2.0**-_HEADROOM
        base_R = top_R + _HEADROOM

        q32_RC = q_RC.to(tl.float32)
        largest_R = tl.maximum(tl.max(tl.abs(q32_RC), 1), 1e-30)
        q32_RC = q32_RC * (LARGEST / largest_R)[:, None]
        q8_RC = ((q32_RC + _ROUND) - _ROUND).to(tl.int8) if INT8 else q32_RC.to(tl.float8e4nv)
        step_R = largest_R * (scale_log2 / LARGEST)
        k_at = kv_head * (_N * C) + n_N[:, None] * C + c_C[None, :]
        v_at = (G + kv_head) * (_N * C) + c_C[:, None] * _N + n_N[None, :]
        scale_at = 2 * G * _N * C // 4 + kv_head
        for j in tl.range(0, n_pages, num_stages=STAGES):
            page = tl.load(pages + j).to(tl.int64)
            k8_NC = tl.load(code_ptr + page * RECORD + k_at)
            v8_CN = tl.load(code_ptr + page * RECORD + v_at)
            k_scale = tl.load(scale_ptr + page * (RECORD // 4) + scale_at)
            v_scale = tl.load(scale_ptr + page * (RECORD // 4) + scale_at + G)
            factor_R = step_R * k_scale
            s_RN = tl.dot(q8_RC, k8_NC.T, out_dtype=SUM).to(tl.float32)
            page_top_R = tl.max(s_RN, 1) * factor_R
            p_RN = tl.exp2(s_RN * factor_R[:, None] - page_top_R[:, None]) * LARGEST
            if INT8:
                p_RN = (p_RN + _ROUND) - _ROUND
                p8_RN = _in_value_order(p_RN).to(tl.int8)
            else:
                p8_RN = _in_value_order(p_RN).to(tl.float8e4nv)
            weight_R = tl.exp2(tl.minimum(page_top_R - base_R, _CAP))
            page_RC = tl.dot(p8_RN, v8_CN.T, out_dtype=SUM).to(tl.float32)
            o_RC += page_RC * (weight_R * v_scale)[:, None]
            sum_R += tl.sum(p_RN, 1) * weight_R
        out_at = (row0 + token_R)[:, None] * (H * C) + head_R[:, None] * C + c_C[None, :]
        out_RC = (o_RC / sum_R[:, None]).to(q_RC.dtype)
        tl.store(out_ptr + out_at, out_RC, mask=ok_R[:, None])

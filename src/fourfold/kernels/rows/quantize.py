"""The verbs on rows: checked, then Triton on a GPU and the reference anywhere else.

Shapes: T rows, K channels, padded to W, D model width, b = 32 channels that are turned together; of
what is combined, K are the choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.rows import reference
from fourfold.kernels.rows.reference import NormedRows, Rows

TURN = 32
WIDEST = 16384
"""Channels a row may have: a kernel holds a row in one block's registers."""


def quantize_rows(
    x_TK: Tensor,
    dtype: torch.dtype,
    width: int,
    *,
    turn_bb: Tensor | None = None,
    swiglu: bool = False,
) -> Rows:
    """Codes of rows [T, K] of float32 or 16 bits, symmetric, with one scale a row.

    `dtype` is int8 or float8_e4m3fn; codes are padded with zeros to `width` channels. The row's
    largest magnitude becomes 127 or 448. With `turn_bb`, an orthogonal float32 [32, 32] matrix,
    every 32 channels are multiplied by it first (K a multiple of 32; on a GPU to about 16 bits,
    float32 rows in TF32). With `swiglu`, `x_TK` is [T, 2 K], gates first, and stands for
    `silu(gate) * up`, computed in float32 and rounded to its dtype. A row of zeros has codes 0 and
    a tiny scale. No host synchronisation.
    """
    if swiglu:
        assert x_TK.shape[1] % 2 == 0, "rows hold as many gates as ups"
        _check(x_TK.chunk(2, 1)[0], dtype, width, turn_bb)
    else:
        _check(x_TK, dtype, width, turn_bb)
    if not x_TK.is_cuda:
        return reference.quantize_rows(x_TK, dtype, width, turn_bb=turn_bb, swiglu=swiglu)
    from fourfold.kernels.rows.triton_rows import launch_quantize

    return launch_quantize(x_TK, dtype, width, turn_bb, swiglu=swiglu)


def rms_norm_quantize(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    width: int,
    *,
    residual_TD: Tensor | None = None,
    keep_normed: bool = False,
    gates_TK: Tensor | None = None,
    live_T: Tensor | None = None,
) -> NormedRows:
    """`rms_norm(x + residual) * weight`, its rows as `quantize_rows` codes them, and the sum.

    `x_TD` and `residual_TD` are [T, D] of one dtype (float32 or 16 bits), `weight_D` [D] of any
    float dtype. The sum is rounded to that dtype before it is normed, as a residual stream is kept;
    without residual and gates the returned one is `x_TD` itself. With `keep_normed` the normed
    rows come back in that dtype too (a router reads them). With `gates_TK` (float [T, K],
    contiguous), `x` is [T, K, D], contiguous, and stands for what `routing.combine` makes of it in
    its dtype; `live_T` as there. No host synchronisation.
    """
    if gates_TK is None:
        assert live_T is None, "only what is combined has rows of padding"
        _check(x_TD, dtype, width, None)
    else:
        assert x_TD.shape[:2] == gates_TK.shape, (x_TD.shape, gates_TK.shape)
        assert x_TD.is_contiguous(), x_TD.shape
        assert gates_TK.is_contiguous(), gates_TK.shape
        assert live_T is None or live_T.shape == x_TD.shape[:1], live_T.shape
        _check(x_TD[:, 0], dtype, width, None)
    assert weight_D.shape == x_TD.shape[-1:], "the norm's weight has another width"
    assert weight_D.is_contiguous(), "the norm's weight must be contiguous"
    if residual_TD is not None:
        assert residual_TD.shape == (x_TD.shape[0], x_TD.shape[-1])
        assert residual_TD.dtype == x_TD.dtype
        assert residual_TD.stride(1) == 1, "channels must be contiguous"
    if not x_TD.is_cuda:
        return reference.rms_norm_quantize(
            x_TD,
            weight_D,
            eps,
            dtype,
            width,
            residual_TD=residual_TD,
            keep_normed=keep_normed,
            gates_TK=gates_TK,
            live_T=live_T,
        )
    from fourfold.kernels.rows.triton_rows import launch_norm

    return launch_norm(
        x_TD, weight_D, eps, dtype, width, residual_TD, keep_normed, gates_TK, live_T
    )


def _check(x_TK: Tensor, dtype: torch.dtype, width: int, turn_bb: Tensor | None) -> None:
    assert x_TK.ndim == 2, "rows are [T, K]"
    assert x_TK.stride(1) == 1, "channels must be contiguous"
    assert dtype in (torch.int8, torch.float8_e4m3fn), f"no 8-bit codes: {dtype}"
    assert x_TK.shape[1] <= width <= WIDEST, f"{x_TK.shape[1]} channels do not fit {width}"
    if turn_bb is not None:
        assert turn_bb.shape == (TURN, TURN), "a turn is [32, 32]"
        assert turn_bb.dtype == torch.float32, f"a turn is float32: {turn_bb.dtype}"
        assert turn_bb.is_contiguous(), "a turn must be contiguous"
        assert x_TK.shape[1] % TURN == 0, "turned channels come in whole blocks"

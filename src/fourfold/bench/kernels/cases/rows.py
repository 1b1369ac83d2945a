"""Rows in 8 bits, the norm before them, and rotated heads; in the shapes of Qwen3-30B-A3B, and of
Llama-3-8B where a dense FFN is meant.

Shapes: T tokens, K channels, D model width, A = (H + 2 G) C for H query heads, G KV heads and C
head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.bench.kernels.case import Case
from fourfold.kernels.rope import norm_rope, rope_angles
from fourfold.kernels.rope import reference as rope_reference
from fourfold.kernels.rows import Rows, quantize_rows, rms_norm_quantize

_WIDTH, _EXPERT_WIDTH, _FFN_WIDTH = 2048, 768, 14336
_HEADS, _KV_HEADS, _HEAD_WIDTH = 32, 4, 128
_EPS = 1e-6
_Verb = Callable[..., tuple[Tensor, Tensor, Tensor]]
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cases(device: torch.device) -> Iterator[Case]:
    """Decode and prefill sizes."""
    for codes in _CODES:
        yield _quantize(16384, _WIDTH, codes, device)
    yield _quantize(64, _WIDTH, "int8", device)
    yield _quantize(131072, _EXPERT_WIDTH, "int8", device)
    yield _quantize(131072, _EXPERT_WIDTH, "int8", device, turned=True)
    for tokens in (16384, 64):
        yield _swiglu(tokens, device)
    for codes in _CODES:
        yield _norm(16384, codes, device)
    yield _norm(16384, "int8", device, keep_normed=True)
    yield _norm(64, "int8", device, keep_normed=True)
    for tokens in (16384, 1):
        yield _angles(tokens, device)
    for tokens in (16384, 64):
        yield _rope(tokens, device)


def _random(rows: int, channels: int, device: torch.device) -> Tensor:
    """bfloat16, with some channels eight times as large as the others."""
    x_TK = torch.randn(rows, channels, dtype=torch.bfloat16, device=device)
    x_TK[:, :: channels // 3] *= 8
    return x_TK


def _values(rows: Rows, channels: int) -> Tensor:
    return rows.codes_TW[:, :channels].float() * rows.scale_T[:, None]


def _off(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def _quantize(
    tokens: int, channels: int, codes: str, device: torch.device, *, turned: bool = False
) -> Case:
    x_TK = _random(tokens, channels, device)
    turn = torch.linalg.qr(torch.randn(32, 32, device=device)).Q.contiguous() if turned else None
    run = partial(quantize_rows, x_TK, _CODES[codes], channels, turn_bb=turn)

    def error() -> float:
        expected = x_TK.float()
        if turn is not None:
            # Not in TF32, whatever the process allows.
            expected = (expected.view(-1, 32).double() @ turn.double()).float().view(x_TK.shape)
        return _off(_values(run(), channels), expected)

    return Case(
        kernel="quantize_rows",
        case=f"{tokens} x {channels}, {codes}{', turned' if turned else ''}",
        run=run,
        work=3.0 * tokens * channels + 4 * tokens,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )


def _swiglu(tokens: int, device: torch.device) -> Case:
    gate_up_T2K = _random(tokens, 2 * _FFN_WIDTH, device)
    turn = torch.linalg.qr(torch.randn(32, 32, device=device)).Q.contiguous()
    quantize = partial(quantize_rows, dtype=torch.int8, width=_FFN_WIDTH, turn_bb=turn)
    run = partial(quantize, gate_up_T2K, swiglu=True)

    def plain() -> Tensor:
        gate_TK, up_TK = gate_up_T2K.chunk(2, 1)
        return F.silu(gate_TK).mul_(up_TK)

    def error() -> float:
        gate_TK, up_TK = gate_up_T2K.float().chunk(2, 1)
        hidden = (F.silu(gate_TK) * up_TK).view(-1, 32)
        # Not in TF32, whatever the process allows, and not all of it in float64 at once.
        parts = [(part.double() @ turn.double()).float() for part in hidden.chunk(16)]
        return _off(_values(run(), _FFN_WIDTH), torch.cat(parts).view(tokens, _FFN_WIDTH))

    size = 5.0 * tokens * _FFN_WIDTH + 4 * tokens
    return Case(
        kernel="quantize_rows",
        case=f"{tokens} x {_FFN_WIDTH}, SwiGLU, int8, turned",
        run=run,
        work=size,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=lambda: quantize(plain()),
        baseline_name="torch silu, mul, then quantised",
        baseline_work=size,
    )


def _norm(tokens: int, codes: str, device: torch.device, *, keep_normed: bool = False) -> Case:
    x_TD, residual_TD = (_random(tokens, _WIDTH, device) for _ in range(2))
    weight_D = torch.rand(_WIDTH, device=device) + 0.5
    run = partial(
        rms_norm_quantize,
        x_TD,
        weight_D,
        _EPS,
        _CODES[codes],
        _WIDTH,
        residual_TD=residual_TD,
        keep_normed=keep_normed,
    )

    def error() -> float:
        expected = F.rms_norm((x_TD + residual_TD).float(), (_WIDTH,), weight_D, _EPS)
        return _off(_values(run().rows, _WIDTH), expected)

    # Read x and residual, write their sum, the codes and perhaps the normed rows.
    element = 7.0 + 2 * keep_normed
    weight_16 = weight_D.bfloat16()
    return Case(
        kernel="rms_norm_quantize",
        case=f"{tokens} x {_WIDTH}, residual, {codes}{', normed kept' if keep_normed else ''}",
        run=run,
        work=element * tokens * _WIDTH + 4 * tokens,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=lambda: F.rms_norm(x_TD + residual_TD, (_WIDTH,), weight_16, _EPS),
        baseline_name="torch add, rms_norm",
        baseline_work=8.0 * tokens * _WIDTH,
    )


def _angles(tokens: int, device: torch.device) -> Case:
    positions_T = torch.randint(40_000, (tokens,), dtype=torch.int32, device=device)
    exponent = torch.arange(0, _HEAD_WIDTH, 2, device=device) / _HEAD_WIDTH
    frequencies = 1e6**-exponent
    run = partial(rope_angles, positions_T, frequencies, torch.bfloat16)

    def error() -> float:
        exact = rope_reference.rope_angles(positions_T, frequencies, torch.float32)
        return max(_off(*both) for both in zip(run(), exact, strict=True))

    size = tokens * (4.0 * _HEAD_WIDTH + 4)
    return Case(
        kernel="rope_angles",
        case=f"{tokens} tokens, heads of {_HEAD_WIDTH}",
        run=run,
        work=size,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=partial(rope_reference.rope_angles, positions_T, frequencies, torch.bfloat16),
        baseline_name="torch cos, sin, cat",
        baseline_work=size,
    )


def _rope(tokens: int, device: torch.device) -> Case:
    across = (_HEADS + 2 * _KV_HEADS) * _HEAD_WIDTH
    qkv_TA = torch.randn(tokens, across, dtype=torch.bfloat16, device=device)
    angle = torch.rand(tokens, _HEAD_WIDTH // 2, device=device) * 6
    cos_TC = torch.cat((angle.cos(), angle.cos()), -1)
    sin_TC = torch.cat((-angle.sin(), angle.sin()), -1)
    weights = [torch.rand(_HEAD_WIDTH, device=device) + 0.5 for _ in range(2)]
    offset_GC = torch.randn(_KV_HEADS, _HEAD_WIDTH, device=device)

    def of(verb: _Verb, qkv_TA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = _HEADS, _KV_HEADS, _HEAD_WIDTH
        return verb(qkv_TA, *heads, cos_TC, sin_TC, *weights, _EPS, offset_GC)

    def error() -> float:
        exact = of(rope_reference.norm_rope, qkv_TA.float())
        return max(_off(*both) for both in zip(of(norm_rope, qkv_TA), exact, strict=True))

    return Case(
        kernel="norm_rope",
        case=f"{tokens} tokens, {_HEADS}/{_KV_HEADS} heads x {_HEAD_WIDTH}, normed, offset",
        run=partial(of, norm_rope, qkv_TA),
        # Values are left where they are.
        work=4.0 * tokens * (across - _KV_HEADS * _HEAD_WIDTH) + 8.0 * tokens * _HEAD_WIDTH,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )

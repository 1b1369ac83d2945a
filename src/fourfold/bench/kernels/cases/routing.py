"""Choosing experts, sorting rows by them, and adding up what they return before the next norm; in
the shapes of Qwen3-30B-A3B.

Shapes: T tokens, K = 8 choices of a token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.bench.kernels.case import Case
from fourfold.kernels.routing import (
    RowGroups,
    Rule,
    combine,
    group_rows,
    route,
    route_and_group,
)
from fourfold.kernels.rows import rms_norm_quantize

_EXPERTS, _CHOICES, _WIDTH = 128, 8, 2048
_EPS = 1e-6
_TOKENS = (1, 256, 16384)


def cases(device: torch.device) -> Iterator[Case]:
    """Decode and prefill sizes."""
    for tokens in _TOKENS:
        yield _route(tokens, device)
    for tokens in (1, 8, 16):
        yield _route_and_group(tokens, device)
    for tokens in _TOKENS:
        yield _group(tokens, device)
    for tokens in _TOKENS:
        yield _combine(tokens, device)


def _router(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, and a router's weights."""
    x_TD = torch.randn(tokens, _WIDTH, dtype=torch.bfloat16, device=device)
    return x_TD, torch.randn(_EXPERTS, _WIDTH, device=device) * _WIDTH**-0.5


def _gates_off(gates_TK: Tensor, x_TD: Tensor, weight_ED: Tensor) -> float:
    exact_TK = (x_TD.double() @ weight_ED.double().T).topk(_CHOICES).values.softmax(-1)
    return float((gates_TK - exact_TK).norm() / exact_TK.norm())


def _route(tokens: int, device: torch.device) -> Case:
    x_TD, weight_ED = _router(tokens, device)
    run = partial(route, x_TD, weight_ED, Rule(_CHOICES))

    def plain() -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(x_TD.float(), weight_ED)
        chosen = logits_TE.topk(_CHOICES, dim=-1)
        return chosen.values.softmax(-1), chosen.indices

    def error() -> float:
        return _gates_off(run()[0], x_TD, weight_ED)

    size = tokens * (2.0 * _WIDTH + 12 * _CHOICES) + 4 * _EXPERTS * _WIDTH
    return Case(
        kernel="route",
        case=f"{tokens} x {_WIDTH}, {_CHOICES} of {_EXPERTS}",
        run=run,
        work=size,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=plain,
        baseline_name="torch linear, topk, softmax",
        baseline_work=size,
    )


def _route_and_group(tokens: int, device: torch.device) -> Case:
    x_TD, weight_ED = _router(tokens, device)
    rule = Rule(_CHOICES)
    run = partial(route_and_group, x_TD, weight_ED, rule)

    def apart() -> RowGroups:
        return group_rows(route(x_TD, weight_ED, rule)[1], _EXPERTS)

    def error() -> float:
        gates_TK, _, groups = run()
        same = torch.equal(groups.order_R, apart().order_R)
        return _gates_off(gates_TK, x_TD, weight_ED) if same else 1.0

    size = tokens * (2.0 * _WIDTH + 16 * _CHOICES) + 4 * _EXPERTS * _WIDTH
    return Case(
        kernel="route_and_group",
        case=f"{tokens} x {_WIDTH}, {_CHOICES} of {_EXPERTS}",
        run=run,
        work=size,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=apart,
        baseline_name="apart",
        baseline_work=size,
    )


def _group(tokens: int, device: torch.device) -> Case:
    experts_TK = torch.rand(tokens, _EXPERTS, device=device).topk(_CHOICES).indices
    run = partial(group_rows, experts_TK, _EXPERTS)

    def error() -> float:
        wanted_R = experts_TK.flatten().argsort(stable=True)
        return float((run().order_R != wanted_R).float().mean())

    return Case(
        kernel="group_rows",
        case=f"{tokens} x {_CHOICES} of {_EXPERTS}",
        run=run,
        work=12.0 * tokens * _CHOICES,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )


def _combine(tokens: int, device: torch.device) -> Case:
    out_TKD = torch.randn(tokens, _CHOICES, _WIDTH, dtype=torch.bfloat16, device=device)
    gates_TK = torch.rand(tokens, _CHOICES, device=device) / _CHOICES
    residual_TD = torch.randn(tokens, _WIDTH, dtype=torch.bfloat16, device=device)
    weight_D = torch.rand(_WIDTH, device=device) + 0.5
    norm = partial(
        rms_norm_quantize,
        weight_D=weight_D,
        eps=_EPS,
        dtype=torch.int8,
        width=_WIDTH,
        residual_TD=residual_TD,
    )
    run = partial(norm, out_TKD, gates_TK=gates_TK)

    def error() -> float:
        summed_TD = (out_TKD.double() * gates_TK.double()[..., None]).sum(1) + residual_TD.double()
        expected = F.rms_norm(summed_TD.float(), (_WIDTH,), weight_D, _EPS)
        rows = run().rows
        out = rows.codes_TW.float() * rows.scale_T[:, None]
        return float((out - expected).norm() / expected.norm())

    # Read what experts returned and the residual, write their sum and the codes.
    size = tokens * (_WIDTH * (2.0 * _CHOICES + 5) + 4 * _CHOICES + 4)
    return Case(
        kernel="rms_norm_quantize",
        case=f"{tokens} x {_CHOICES} x {_WIDTH}, combined, residual, int8",
        run=run,
        work=size,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=lambda: norm(combine(out_TKD, gates_TK, out_dtype=torch.bfloat16)),
        baseline_name="apart",
        baseline_work=size,
    )

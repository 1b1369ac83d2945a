"""What training computes besides products: references against autograd, kernels against those."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels import training
from fourfold.kernels.rope import norm_rope
from fourfold.kernels.training import (
    reference,
    triton_accumulate,
    triton_adamw,
    triton_cross_entropy,
    triton_norm,
    triton_rope_backward,
    triton_sum_rows,
    triton_swiglu,
)

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS, WIDTH, TOKENS = 6, 2, 16, 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def close(got: Tensor | None, wanted: Tensor | None) -> None:
    if got is None or wanted is None:
        assert got is wanted
        return
    assert got.dtype == wanted.dtype
    rounds = 1e-5 if got.dtype == torch.float32 else 0.02
    torch.testing.assert_close(got, wanted, rtol=rounds, atol=rounds)


def close_all(got: Iterable[Tensor | None], wanted: Iterable[Tensor | None]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("gated", [False, True])
def test_swiglu_and_its_gradients(gated: bool) -> None:
    gate_up, gates = torch.randn(7, 20, requires_grad=True), torch.rand(7, requires_grad=True)
    one, other = gate_up.chunk(2, -1)
    plain = F.silu(one) * other * (gates[:, None] if gated else 1)
    close(training.gated_swiglu(gate_up.detach(), gates.detach() if gated else None), plain)
    upstream = torch.randn(7, 10)
    wanted = torch.autograd.grad(plain, (gate_up, gates), upstream, allow_unused=True)
    got = training.gated_swiglu_backward(
        upstream, gate_up.detach(), gates.detach() if gated else None
    )
    close_all(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(9, 24), (3, 1100), (0, 8)])
def test_the_swiglu_kernels(rows: int, width: int, gated: bool, dtype: torch.dtype) -> None:
    gate_up, upstream = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    gates = torch.rand(rows) if gated else None
    close(triton_swiglu.launch(gate_up, gates), reference.gated_swiglu(gate_up, gates))
    got = triton_swiglu.launch_backward(upstream, gate_up, gates)
    wanted = reference.gated_swiglu_backward(upstream, gate_up, gates)
    close(got[0], wanted[0])
    if gated:
        assert got[1] is not None
        assert wanted[1] is not None
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("adds", [False, True])
def test_the_norm_of_a_sum_and_its_gradients(adds: bool) -> None:
    stream, delta, weight = (torch.randn(*s, requires_grad=True) for s in ((5, 12), (5, 12), (12,)))
    added = stream + delta if adds else stream
    plain = F.rms_norm(added, (12,), weight, 1e-6)
    got, sum_ = training.add_norm(
        stream.detach(), delta.detach() if adds else None, weight.detach(), 1e-6
    )
    close(got, plain)
    close(sum_, added)
    upstream, along = torch.randn(5, 12), torch.randn(5, 12)
    wanted = torch.autograd.grad((plain, added), (stream, weight), (upstream, along))
    close_all(training.add_norm_backward(upstream, along, sum_, weight.detach(), 1e-6), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (700, 24), (5, 2100)])
def test_the_norm_kernels(rows: int, width: int, adds: bool, dtype: torch.dtype) -> None:
    stream, delta, upstream, along = torch.randn(4, rows, width).to(dtype).unbind()
    weight = torch.rand(width).to(dtype)
    wanted = reference.add_norm(stream, delta if adds else None, weight, 1e-5)
    close_all(triton_norm.launch(stream, delta if adds else None, weight, 1e-5), wanted)
    arguments = (upstream, along if adds else None, wanted[1], weight, 1e-5)
    got = triton_norm.launch_backward(*arguments)
    close(got[0], reference.add_norm_backward(*arguments)[0])
    torch.testing.assert_close(
        got[1], reference.add_norm_backward(*arguments)[1], rtol=1e-4, atol=1e-4
    )


def run_adamw(step: Callable[..., None], dtype: torch.dtype) -> list[Tensor]:
    """Three steps of a weight of 5,000 numbers: the weight, its means, and the weight rounded."""
    torch.manual_seed(7)
    state = [torch.randn(2, 2500), torch.zeros(2, 2500), torch.zeros(2, 2500)]
    rounded = torch.empty(2, 2500, dtype=torch.bfloat16)
    for number in (1, 2, 3):
        grad = torch.randn(2, 2500).to(dtype)
        numbers_4 = torch.tensor([0.5, 0.01, 1 / (1 - 0.9**number), (1 - 0.95**number) ** -0.5])
        master, mean, square = state
        constants = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
        step(master, grad, mean, square, rounded, numbers_4, **constants)
    return [*state, rounded]


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    got = run_adamw(training.adamw, dtype)
    torch.manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(2, 2500))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(2, 2500).to(dtype).float() * 0.5
        optimizer.step()
    close(got[0], weight.detach())
    close(got[3], weight.detach().bfloat16())
    moments = optimizer.state[weight]
    close_all(got[1:3], (moments["exp_avg"], moments["exp_avg_sq"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adamw_kernel(dtype: torch.dtype) -> None:
    close_all(
        run_adamw(triton_adamw.launch, dtype),
        run_adamw(training.adamw, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    first, second = torch.randn(3, 2500).to(dtype), torch.randn(3, 2500).bfloat16()
    wanted = first.float() + second.float()
    by_kernel = torch.empty_like(wanted)
    triton_accumulate.launch(by_kernel, first, second)
    got = training.accumulate(first, second)
    assert torch.equal(got, wanted)
    assert torch.equal(by_kernel, wanted)
    assert (got is first) == (dtype is torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("choices", "width"), [(1, 8), (3, 40), (2, 2100)])
def test_rows_are_added_up(choices: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(4 * choices, width).to(dtype)
    places = torch.randperm(4 * choices).view(4, choices)
    wanted = torch.stack([rows[place].double().sum(0) for place in places]).to(dtype)
    close(training.sum_rows(rows, places), wanted)
    close(triton_sum_rows.launch(rows, places), wanted)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [11, 64, 5000])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype, gradient: bool) -> None:
    """In rows with large logits too, and where there is no target."""
    logits = (torch.randn(6, vocabulary) * torch.tensor([1, 1, 9, 9, 80, 80])[:, None]).to(dtype)
    target = torch.randint(vocabulary, (6,))
    target[1] = -1
    exact = logits.double().requires_grad_()
    plain = F.cross_entropy(exact, target, ignore_index=-1, reduction="none")
    (wanted,) = torch.autograd.grad(plain.sum(), exact)
    for compute in (
        lambda x: training.cross_entropy(x, target, gradient=gradient),
        lambda x: triton_cross_entropy.launch(x, target, gradient),
    ):
        given = logits.clone()
        torch.testing.assert_close(compute(given).double(), plain, rtol=1e-4, atol=1e-4)
        if gradient:
            close(given, wanted.to(dtype))
        else:
            assert torch.equal(given, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [(False, False), (True, True), (False, True)])
def test_gradients_through_norm_and_rotation(normed: tuple[bool, bool], dtype: torch.dtype) -> None:
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * WIDTH).to(dtype).requires_grad_()
    angle = torch.rand(TOKENS, WIDTH // 2) * 6
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((-angle.sin(), angle.sin()), -1)
    weights = [
        (torch.rand(WIDTH) + 0.5).to(dtype).requires_grad_() if given else None for given in normed
    ]
    out = norm_rope(qkv, HEADS, KV_HEADS, WIDTH, cos, sin, *weights)
    upstream = tuple(torch.randn_like(part) for part in out)
    leaves = [qkv, *[weight for weight in weights if weight is not None]]
    wanted = iter(torch.autograd.grad(out, leaves, upstream))
    arguments = (qkv.detach(), cos, sin, *[w if w is None else w.detach() for w in weights])
    got = training.norm_rope_backward(upstream, *arguments)
    for mine in got:
        if mine is not None:
            close(mine.to(dtype), next(wanted))
    for mine, theirs in zip(
        triton_rope_backward.launch(upstream, *arguments, 1e-6), got, strict=True
    ):
        close(mine, theirs)

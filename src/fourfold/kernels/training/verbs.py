"""The verbs: checked, then Triton on a GPU and the reference anywhere else.

All compute in float32 and round once to the dtype of their inputs. Sums are added in a fixed order,
so the same inputs give the same bits in every run.

Shapes: T tokens, K choices of a token, R rows, D width, F FFN width, V vocabulary, H query heads,
G KV heads, C head width, A = (H + 2 G) C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.training import reference

# A program a row has too little to do with fewer channels.
_NARROW = 128


def gated_swiglu(gate_up_RF: Tensor, gates_R: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, times the row's gate where there is one; [R, 2F] -> [R, F].

    `gate_up_RF` holds the gates' channels first and is contiguous; `gates_R` is float32.
    """
    _check_swiglu(gate_up_RF, gates_R)
    if not gate_up_RF.is_cuda:
        return reference.gated_swiglu(gate_up_RF, gates_R)
    from fourfold.kernels.training.triton_swiglu import launch

    return launch(gate_up_RF, gates_R)


def gated_swiglu_backward(
    grad_RF: Tensor, gate_up_RF: Tensor, gates_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gated_swiglu` for its inputs, [R, 2F] and float32 [R]."""
    _check_swiglu(gate_up_RF, gates_R)
    assert grad_RF.is_contiguous(), grad_RF.stride()
    assert grad_RF.shape[1] * 2 == gate_up_RF.shape[1], (grad_RF.shape, gate_up_RF.shape)
    if not gate_up_RF.is_cuda:
        return reference.gated_swiglu_backward(grad_RF, gate_up_RF, gates_R)
    from fourfold.kernels.training.triton_swiglu import launch_backward

    return launch_backward(grad_RF, gate_up_RF, gates_R)


def add_norm(
    stream_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight` of the sum x of stream and delta, and the sum; without a delta that is
    the stream itself. [T, D] each, of one dtype and contiguous."""
    given = (stream_TD,) if delta_TD is None else (stream_TD, delta_TD)
    _check_norm(weight_D, *given)
    if not stream_TD.is_cuda:
        return reference.add_norm(stream_TD, delta_TD, weight_D, eps)
    from fourfold.kernels.training.triton_norm import launch

    return launch(stream_TD, delta_TD, weight_D, eps)


def add_norm_backward(
    grad_normed_TD: Tensor,
    grad_added_TD: Tensor | None,
    added_TD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_norm` from those of what is normed and, where it is used, of the sum: for
    the sum, which is that for stream and delta, and float32 [D] for the weight."""
    given = (grad_normed_TD,) if grad_added_TD is None else (grad_normed_TD, grad_added_TD)
    _check_norm(weight_D, added_TD, *given)
    if not added_TD.is_cuda:
        return reference.add_norm_backward(grad_normed_TD, grad_added_TD, added_TD, weight_D, eps)
    from fourfold.kernels.training.triton_norm import launch_backward

    return launch_backward(grad_normed_TD, grad_added_TD, added_TD, weight_D, eps)


def adamw(
    master: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    rounded: Tensor | None,
    numbers_4: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101), in place.

    Args:
        master: the weight, float32.
        grad: its gradient, of any floating dtype.
        mean: the running mean of gradients, float32.
        square: that of their squares, float32.
        rounded: what is computed with in another dtype, which takes the rounded weight; or None.
        numbers_4: float32 on the device, where a captured step finds each step's own: what
            gradients are multiplied by first, the learning rate, and what makes up for a mean and a
            root of squares that began at zero, `1 / (1 - beta1**step)` and
            `(1 - beta2**step)**-0.5`.
        beta1, beta2, eps: of the means.
        decay: times the rate, the share of the weight that is taken off.
    """
    tensors = (master, grad, mean, square, *(() if rounded is None else (rounded,)))
    for each in tensors:
        assert each.shape == master.shape, (each.shape, master.shape)
        assert each.is_contiguous(), each.stride()
    assert numbers_4.shape == (4,), numbers_4.shape
    constants = {"beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    if not master.is_cuda:
        reference.adamw(master, grad, mean, square, rounded, numbers_4, **constants)
        return
    from fourfold.kernels.training.triton_adamw import launch

    launch(master, grad, mean, square, rounded, numbers_4, **constants)


def accumulate(total: Tensor, grad: Tensor) -> Tensor:
    """The sum of two gradients of any floating dtype, float32: in `total` if that is float32, else
    somewhere new. Both are contiguous."""
    for each in (total, grad):
        assert each.shape == total.shape, (each.shape, total.shape)
        assert each.is_contiguous(), each.stride()
    out = total if total.dtype is torch.float32 else torch.empty_like(total, dtype=torch.float32)
    if not total.is_cuda:
        return torch.add(total.float(), grad, out=out)
    from fourfold.kernels.training.triton_accumulate import launch

    launch(out, total, grad)
    return out


def sum_rows(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """Sum of rows `place_TK[t]` for every token, in the order of its choices; [T, D].

    `place_TK` is int64, every entry in 0..R-1; both are contiguous. With one choice that is a
    gather.
    """
    assert rows_RD.is_contiguous(), rows_RD.stride()
    assert place_TK.is_contiguous(), place_TK.stride()
    if place_TK.shape[1] == 1 and (not rows_RD.is_cuda or rows_RD.shape[1] < _NARROW):
        return rows_RD.index_select(0, place_TK[:, 0])
    if not rows_RD.is_cuda:
        return reference.sum_rows(rows_RD, place_TK)
    from fourfold.kernels.training.triton_sum_rows import launch

    return launch(rows_RD, place_TK)


def cross_entropy(logits_SV: Tensor, target_S: Tensor, *, gradient: bool) -> Tensor:
    """Each row's cross-entropy, float32 [S], zero where its target (int64) is negative.

    With `gradient` the logits, contiguous, are overwritten by the gradient of the rows' sum.
    """
    assert logits_SV.is_contiguous(), logits_SV.stride()
    assert target_S.shape == logits_SV.shape[:1], (target_S.shape, logits_SV.shape)
    if not logits_SV.is_cuda:
        return reference.cross_entropy(logits_SV, target_S, gradient=gradient)
    from fourfold.kernels.training.triton_cross_entropy import launch

    return launch(logits_SV, target_S, gradient)


def norm_rope_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv_TA: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `kernels.rope.norm_rope` from those of q [T, H, C], k and v [T, G, C]: for the
    projection, and float32 [C] for the norms' weights where there are such."""
    assert all(grad.is_contiguous() for grad in grads), [grad.stride() for grad in grads]
    assert qkv_TA.stride(1) == 1, "channels must be contiguous"
    width = grads[0].shape[2]
    assert qkv_TA.shape[1] == sum(grad.shape[1] for grad in grads) * width, qkv_TA.shape
    arguments = (grads, qkv_TA, cos_TC, sin_TC, q_norm_weight, k_norm_weight, eps)
    if not qkv_TA.is_cuda:
        return reference.norm_rope_backward(*arguments)
    from fourfold.kernels.training.triton_rope_backward import launch

    return launch(*arguments)


def _check_swiglu(gate_up_RF: Tensor, gates_R: Tensor | None) -> None:
    assert gate_up_RF.is_contiguous(), gate_up_RF.stride()
    assert gates_R is None or gates_R.shape == gate_up_RF.shape[:1], gates_R
    assert gates_R is None or gates_R.is_contiguous(), gates_R


def _check_norm(weight_D: Tensor, first_TD: Tensor, *others: Tensor) -> None:
    assert first_TD.shape[1:] == weight_D.shape, (first_TD.shape, weight_D.shape)
    assert weight_D.is_contiguous(), weight_D.stride()
    for each_TD in (first_TD, *others):
        assert each_TD.is_contiguous(), each_TD.stride()
        assert each_TD.shape == first_TD.shape, (each_TD.shape, first_TD.shape)
        assert each_TD.dtype == first_TD.dtype, (each_TD.dtype, first_TD.dtype)

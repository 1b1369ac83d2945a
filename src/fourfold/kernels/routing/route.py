"""Which experts a token goes to, and with what weight: the router's product and its choice; and
sorting the rows by expert on the way.

Logits are float32 whatever the rows are kept in. Experts come best first, of equals the one with
the smaller number.

Shapes: T tokens, D model width, E experts, K choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.routing import reference
from fourfold.kernels.routing.choose import sorts_at_once
from fourfold.kernels.routing.group_rows import group_rows
from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.routing.rule import Rule, Spread


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    *,
    bias_E: Tensor | None = None,
    spread: Spread | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates, float32 [T, K], and experts, int64 [T, K], both contiguous.

    `x_TD` is [T, D] of float32 or 16 bits, `weight_ED` and `bias_E` are float32; the bias is added
    to scores for choosing and does not weigh. On a GPU at most 1024 experts. A row with NaN still
    goes to K different experts. No host synchronisation.
    """
    _check(x_TD, weight_ED, rule, bias_E)
    if not x_TD.is_cuda:
        return reference.route(x_TD, weight_ED, rule, bias_E=bias_E, spread=spread)
    from fourfold.kernels.routing.triton_route import launch_route

    return launch_route(x_TD, weight_ED, rule, bias_E, spread)


def route_and_group(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    *,
    bias_E: Tensor | None = None,
    spread: Spread | None = None,
    live_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, RowGroups]:
    """Gates and experts as `route` gives them, and what `group_rows` makes of these experts with
    `live_T`; at least one token. For few tokens on a GPU the choice sorts them, too."""
    _check(x_TD, weight_ED, rule, bias_E)
    assert len(x_TD) > 0, x_TD.shape
    assert live_T is None or live_T.shape == x_TD.shape[:1], live_T.shape
    if x_TD.is_cuda and sorts_at_once(len(x_TD), len(weight_ED)):
        from fourfold.kernels.routing.triton_route import launch_route_and_group

        return launch_route_and_group(x_TD, weight_ED, rule, bias_E, spread, live_T)
    gates_TK, experts_TK = route(x_TD, weight_ED, rule, bias_E=bias_E, spread=spread)
    return gates_TK, experts_TK, group_rows(experts_TK, len(weight_ED), live_T=live_T)


def choose_experts(logits_TE: Tensor, rule: Rule, *, bias_E: Tensor | None = None) -> Tensor:
    """The experts, int64 [T, K], that `route` chooses where these are the logits: float32,
    contiguous."""
    assert logits_TE.is_contiguous(), logits_TE.stride()
    assert logits_TE.dtype == torch.float32, logits_TE.dtype
    assert 0 < rule.choices <= logits_TE.shape[1], rule
    assert bias_E is None or bias_E.shape == logits_TE.shape[1:], bias_E.shape
    assert not logits_TE.is_cuda or logits_TE.shape[1] <= 1024, logits_TE.shape
    if not logits_TE.is_cuda:
        return reference.choose_experts(logits_TE, rule, bias_E=bias_E)
    from fourfold.kernels.routing.triton_route import launch_choose_experts

    return launch_choose_experts(logits_TE, rule, bias_E)


def _check(x_TD: Tensor, weight_ED: Tensor, rule: Rule, bias_E: Tensor | None) -> None:
    assert x_TD.shape[1] == weight_ED.shape[1], (x_TD.shape, weight_ED.shape)
    assert bias_E is None or bias_E.shape == weight_ED.shape[:1], bias_E.shape
    assert 0 < rule.choices <= weight_ED.shape[0], rule
    if x_TD.is_cuda:
        assert x_TD.stride(1) == 1, "channels must be contiguous"
        assert weight_ED.is_contiguous(), weight_ED.shape
        assert weight_ED.dtype == torch.float32, weight_ED.dtype
        assert weight_ED.shape[0] <= 1024, weight_ED.shape

"""What both FFN quadrants share: routed tokens, the experts' weights, and the way back.

Experts may share storage: `slot_E` maps an expert to the slot that holds its weights (several
experts a slot, as in an upcycled model). Rows are grouped by slot, so shared weights are read once.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, S slots,
R = T * K rows (a row is one token at one expert).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.routing import RowGroups
from fourfold.kernels.routing import combine as combine_rows
from fourfold.quantize.weights import DenseWeight, Encoded, W8A8Weight, Weight


@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts each token goes to, `experts_TK` int64, and their weights, `gates_TK` float32."""

    gates_TK: Tensor
    experts_TK: Tensor


@dataclasses.dataclass(frozen=True)
class GroupedRouting(Routing):
    """The same, its rows sorted by expert already; those that only pad a step are in no group."""

    groups: RowGroups


class Routed(NamedTuple):
    """What the experts of each token returned, not added up yet: whoever reads it next can do that
    in the same pass. `live_T` as in `prefill_ffn`."""

    out_TKD: Tensor
    gates_TK: Tensor
    live_T: Tensor | None

    def combined(self) -> Tensor:
        """The weighted sums, [T, D] in the dtype of what was returned."""
        out_dtype = self.out_TKD.dtype
        return combine_rows(self.out_TKD, self.gates_TK, out_dtype=out_dtype, live_T=self.live_T)


Delta = Tensor | Routed
"""What a layer adds to the residual stream, [T, D] or to be combined to that."""


def combined(delta: Delta) -> Tensor:
    """[T, D]."""
    return delta.combined() if isinstance(delta, Routed) else delta


class ExpertWeights(nn.Module):
    """Gated FFNs `down(silu(gate(x)) * up(x))`: `gate_up` [S, 2F, D] with the gate's rows first,
    `down` [S, D, F]. `slot_E` is None where every expert has a slot of its own."""

    slot_E: Tensor | None

    def __init__(
        self, gate_up: Weight, down: Weight, *, slots: int, slot_E: Tensor | None = None
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.slots = slots
        self.register_buffer("slot_E", slot_E)

    def slot_of(self, experts_TK: Tensor) -> Tensor:
        """The slots that hold the weights of these experts."""
        return experts_TK if self.slot_E is None else self.slot_E[experts_TK]


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of rows that hold both, gate first; [R, 2F] -> [R, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def visit_experts(rows: Encoded, weights: ExpertWeights, ends: Sequence[int]) -> Tensor:
    """Each touched slot's FFN over its own rows, one slot after the other; [R, D].

    `rows` are encoded for `weights.gate_up` and sorted by slot, rows of slot s ending at `ends[s]`.
    """
    gate_up, down = weights.gate_up, weights.down
    assert isinstance(gate_up, DenseWeight | W8A8Weight)
    assert isinstance(down, DenseWeight | W8A8Weight)
    outputs = []
    start = 0
    for slot, end in enumerate(ends):
        if end > start:
            mine = tuple(tensor[start:end] for tensor in rows)
            hidden_RF = swiglu(gate_up.product(mine, slot))
            outputs.append(down.product(down.encode(hidden_RF), slot))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def combine(out_TKD: Tensor, gates_TK: Tensor) -> Tensor:
    """Sum of each token's expert outputs weighted by its gates, in a fixed order; [T, D]."""
    return torch.bmm(gates_TK[:, None, :].to(out_TKD.dtype), out_TKD).squeeze(1)

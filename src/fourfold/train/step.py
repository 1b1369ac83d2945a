"""One micro-batch as the decoder's quadrants, with gradients.

Rows are packed documents: attention is causal and stays within a document, and positions count from
each document's beginning, as when it is served. The FFN is dropless: rows are sorted by expert, and
every expert sees one product over all of its rows.

Shapes: B rows, L tokens of a row, T = B L, H query heads, G KV heads, C head width, D model width,
F expert width, E experts, K experts per token, R = T K routed rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.grouped_gemm import grouped_gemm
from fourfold.kernels.routing import group_rows
from fourfold.quadrants.experts import ExpertWeights, Routing
from fourfold.quadrants.projection import Projected
from fourfold.quantize.weights import Activations, DenseWeight, Weight
from fourfold.train.data.batches import Batch
from fourfold.train.parallel import ExpertExchange
from fourfold.train.router import TrainedRouting
from fourfold.train.rows import (
    collect_rows,
    inverse_of,
    permuted,
    rotated,
    spread_rows,
    trained_swiglu,
)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Where documents lie in the rows of a micro-batch, on its device. Where every row is of one
    document there is neither a mask nor are there beginnings: attention is causal and no more."""

    rows: int
    length: int
    positions_T: Tensor
    mask_BLL: Tensor | None = None
    """Which token [.., i, :] reads which, on a CPU."""
    starts_N: Tensor | None = None
    """int32: where documents begin in T and where the last ends, padded with that, on a GPU."""


class MicroBatch(NamedTuple):
    """Rows that are computed at a time, on their device."""

    documents: Documents
    tokens_T: Tensor
    target_T: Tensor
    """-1 where the next token is of another document."""


class TrainStep:
    """Computes attention and experts of one micro-batch; `routings` and `loads` are those of its
    sparse layers, in order, once the decoder has run."""

    live_T: Tensor | None = None

    def __init__(self, documents: Documents, exchange: ExpertExchange | None = None) -> None:
        self.documents = documents
        self.routings: list[TrainedRouting] = []
        self._ends: list[Tensor] = []
        self._exchange = exchange

    # Left out of what is compiled: they are few kernels already, and their sizes vary.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        """Causal attention of each token over its own document, [T, H C]."""
        q_THC, k_TGC, v_TGC = rotated(projected)
        documents = self.documents
        if documents.starts_N is not None:
            out_THC = _varlen(q_THC, k_TGC, v_TGC, documents.starts_N, documents.length)
        else:
            out_THC = _by_rows(q_THC, k_TGC, v_TGC, documents)
        return Activations(out_THC.flatten(1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Tensor:
        """The routed FFN of every token, [T, D]."""
        assert isinstance(routing, TrainedRouting)
        gate_up, down = weights.gate_up, weights.down
        assert isinstance(gate_up, DenseWeight)
        assert isinstance(down, DenseWeight)
        self.routings.append(routing)
        choices = routing.experts_TK.shape[1]
        groups = group_rows(routing.experts_TK, routing.logits_TE.shape[1])
        self._ends.append(groups.ends_E)
        order_R = groups.order_R.long()
        place_R = inverse_of(order_R)
        token_R, place_TK = order_R // choices, place_R.view(-1, choices)
        rows_RD = spread_rows(x.kept, token_R, place_TK)
        gates_R = permuted(routing.gates_TK.view(-1, 1), order_R, place_R)[:, 0]
        matrices = gate_up.weight, down.weight
        if self._exchange is None:
            out_RD = _expert_ffn(rows_RD, gates_R, *matrices, groups.ends_E)
        else:
            sent = self._exchange.plan(groups.ends_E)
            rows_QD, gates_Q = sent.forth(rows_RD), sent.forth(gates_R[:, None])[:, 0]
            out_RD = sent.back(_expert_ffn(rows_QD, gates_Q, *matrices, sent.ends_E))
        return collect_rows(out_RD, token_R, place_TK)

    def loads(self) -> Tensor:
        """Rows of this process's tokens that went to each expert, float32 [layers, E]."""
        ends_LE = torch.stack(self._ends)
        return torch.diff(ends_LE, prepend=torch.zeros_like(ends_LE[:, :1])).float()


def _expert_ffn(
    rows_RD: Tensor, gates_R: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """Each expert's FFN over its own rows, times their gates. The gates are put before the last
    product, which is linear, so that what comes out of it need not be kept for their gradients."""
    if not len(rows_RD):
        # Of no rows torch has no gradients, and the other processes wait for these experts'.
        row_1D, gate_1 = rows_RD.new_zeros(1, rows_RD.shape[1]), gates_R.new_zeros(1)
        rows_1D, gates_1 = torch.cat((rows_RD, row_1D)), torch.cat((gates_R, gate_1))
        ends_E = torch.ones_like(ends_E)
        return _expert_ffn(rows_1D, gates_1, gate_up_EFD, down_EDF, ends_E)[:0]
    hidden_RF = trained_swiglu(grouped_gemm(rows_RD, gate_up_EFD, ends_E), gates_R)
    return grouped_gemm(hidden_RF, down_EDF, ends_E)


def lay_out(batch: Batch, device: torch.device) -> MicroBatch:
    """A batch as a device computes it."""
    document_BL = batch.document[:, :-1]
    rows, length = document_BL.shape
    within = batch.document[:, 1:] == document_BL
    target_T = torch.where(within, batch.tokens[:, 1:], -1).flatten()
    place_BL = torch.arange(length).expand(rows, length)
    first_BL = torch.ones(rows, length, dtype=torch.bool)
    first_BL[:, 1:] = ~within[:, :-1]
    start_BL = torch.where(first_BL, place_BL, 0).cummax(1).values
    positions_T = (place_BL - start_BL).flatten().int()
    mask_BLL: Tensor | None = None
    starts_N: Tensor | None = None
    found = first_BL.flatten().nonzero().flatten()
    packed = len(found) > rows  # some row is of several documents
    if packed and device.type == "cuda":
        # Few sizes: what is compiled for one of them serves many batches.
        room = 1 << len(found).bit_length()
        starts_N = torch.full((room + 1,), rows * length, dtype=torch.int32)
        starts_N[: len(found)] = found
        starts_N = moved(starts_N, device)
    elif packed:
        same_BLL = start_BL[:, :, None] == start_BL[:, None, :]
        mask_BLL = same_BLL & torch.ones(length, length, dtype=torch.bool).tril()
    documents = Documents(rows, length, moved(positions_T, device), mask_BLL, starts_N)
    tokens_T = batch.tokens[:, :-1].flatten()
    return MicroBatch(documents, moved(tokens_T, device), moved(target_T, device))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which need not have it before what it is given next."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _by_rows(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, documents: Documents) -> Tensor:
    """Causal attention within each row, and by its mask where there is one; [T, H, C]."""
    q, k, v = (
        torch.unflatten(x, 0, (documents.rows, documents.length)).transpose(1, 2)
        for x in (q_THC, k_TGC, v_TGC)
    )
    mask_BLL = documents.mask_BLL
    mask_B1LL = None if mask_BLL is None else mask_BLL[:, None]
    with _fastest() if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, mask_B1LL, is_causal=mask_BLL is None, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(0, 1)


def _fastest() -> contextlib.AbstractContextManager[None]:
    """Has torch try cuDNN first, which takes half the time of its own kernels on Hopper."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _varlen(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, starts_N: Tensor, length: int) -> Tensor:
    """Flash attention over documents that begin at `starts_N`; [T, H, C]."""
    from torch.nn.attention.varlen import varlen_attn

    attend: Callable[..., Any] = varlen_attn
    bounds = (starts_N, starts_N, length, length)
    told = {"enable_gqa": True} if _asks_for_groups(attend) else {}
    out_THC: Tensor = attend(q_THC, k_TGC, v_TGC, *bounds, window_size=(-1, 0), **told)
    return out_THC


@functools.cache
def _asks_for_groups(attend: Callable[..., Any]) -> bool:
    """Whether it wants to be told that query heads share KV heads; in torch 2.11 they just may."""
    return "enable_gqa" in inspect.signature(attend).parameters

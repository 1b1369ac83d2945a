"""Residual streams of some prompts, taken through a model layer by layer.

Each prompt has one token more than is prefilled, which is decoded. Streams are in the basis of
their model: a quantised one is rotated (`models.rotation`).

Shapes: N prompts, M tokens of each, D model width, K experts per token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fourfold.models.config import ModelConfig
from fourfold.models.conversion.windows import WindowStep
from fourfold.models.decoder import Block, Decoder
from fourfold.models.layers import Rope, SparseFFN
from fourfold.models.rotation import Rotation
from fourfold.models.router import Router
from fourfold.quadrants.experts import Routing, combined
from fourfold.quadrants.kv_pages import PAGE_TOKENS, PageShape, Span, make_pages
from fourfold.quadrants.step import QuadrantStep, lay_out
from fourfold.quantize.weights import DenseWeight


class Routes:
    """The experts that one layer of the exact model chose, for other models to go to."""

    rows: slice
    """Of each prompt, the tokens whose turn it is."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.agreement: list[float] = []
        """How many of the chosen experts another model would have chosen itself, as shares."""

    def record(self, routing: Routing) -> None:
        """Takes in the choice for the next tokens of all prompts."""
        self._parts.append((self._by_prompt(routing.gates_TK), self._by_prompt(routing.experts_TK)))

    def follow(self, own: Routing) -> Routing:
        """The recorded choice for `rows`, whatever the own one is."""
        gates_NMK, experts_NMK = (torch.cat(part, dim=1) for part in zip(*self._parts, strict=True))
        gates_TK = gates_NMK[:, self.rows].flatten(0, 1).contiguous()
        experts_TK = experts_NMK[:, self.rows].flatten(0, 1).contiguous()
        same = (own.experts_TK[:, :, None] == experts_TK[:, None, :]).any(-1)
        self.agreement.append(float(same.float().mean()))
        return Routing(gates_TK, experts_TK)

    def _by_prompt(self, x_TK: Tensor) -> Tensor:
        return x_TK.view(self._prompts, -1, x_TK.shape[-1])


class Recording(nn.Module):
    """Stands for the exact model's router."""

    def __init__(self, router: Router, routes: Routes) -> None:
        super().__init__()
        self._router, self._routes = router, routes

    def forward(self, x_TD: Tensor) -> Routing:
        routing: Routing = self._router(x_TD)
        self._routes.record(routing)
        return routing


class Following(nn.Module):
    """Stands for another model's router."""

    def __init__(self, router: Router, routes: Routes) -> None:
        super().__init__()
        self._router, self._routes = router, routes

    def forward(self, x_TD: Tensor) -> Routing:
        return self._routes.follow(self._router(x_TD))


def replace_router(block: Block, kind: type[Recording | Following], routes: Routes) -> None:
    """Lets a layer record its choices of experts, or follow those recorded."""
    if isinstance(block.ffn, SparseFFN):
        block.ffn.router = kind(block.ffn.router, routes)  # type: ignore[assignment]  # it stands in


def stream_turn(config: ModelConfig, device: torch.device) -> Tensor:
    """The orthogonal matrix [D, D], float32, by which quantising a model turns its stream: what
    becomes of an embedding of unit rows."""
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config, layers=0, vocabulary=config.width))
    unit_DD = torch.eye(config.width, device=device)
    model.embedding.weight = nn.Parameter(unit_DD, requires_grad=False)
    model.head.weight = DenseWeight(unit_DD)
    model.norm.weight = nn.Parameter(torch.ones(config.width, device=device), requires_grad=False)
    Rotation(config, device).rotate_ends(model)
    turn_DD: Tensor = model.embedding.weight.data
    return turn_DD


class PagedPath:
    """As when serving: over pages, all prompts but their last token at once, then that."""

    def __init__(
        self,
        shape: PageShape,
        *,
        heads: int,
        frequencies: Tensor,
        dtype: torch.dtype,
        prompts: int,
        tokens: int,
    ) -> None:
        self._dtype = dtype
        each = -(-tokens // PAGE_TOKENS)
        pages = make_pages(shape, prompts * each, prompts, frequencies.device)
        owned = [range(number * each, (number + 1) * each) for number in range(prompts)]
        prefills = [Span(0, tokens - 1, own, slot) for slot, own in enumerate(owned)]
        decodes = [Span(tokens - 1, 1, own, slot) for slot, own in enumerate(owned)]
        steps = (
            (slice(0, tokens - 1), lay_out(pages, [], prefills, heads=heads)),
            (slice(tokens - 1, tokens), lay_out(pages, decodes, [], heads=heads)),
        )
        self._parts: list[tuple[slice, QuadrantStep, Rope]] = [
            (rows, step, Rope.at(step.positions_T, frequencies, dtype)) for rows, step in steps
        ]

    def through(self, block: Block, x_NMD: Tensor, routes: Routes) -> Tensor:
        """The stream after a layer, float32."""
        out_NMD = torch.empty_like(x_NMD, dtype=torch.float32)
        for rows, step, rope in self._parts:
            routes.rows = rows
            x_TD = x_NMD[:, rows].to(self._dtype).flatten(0, 1)
            stream_TD, delta = block(x_TD, None, rope, step)
            after_TD = stream_TD.float() + combined(delta)
            out_NMD[:, rows] = after_TD.unflatten(0, (len(x_NMD), -1))
        return out_NMD


class PlainPath:
    """In float32, each prompt attending to itself, all tokens at once."""

    def __init__(self, frequencies: Tensor, prompts: int, tokens: int) -> None:
        self._tokens = tokens
        positions_T = torch.arange(tokens, device=frequencies.device).repeat(prompts)
        self._rope = Rope.at(positions_T, frequencies, torch.float32)

    def through(self, block: Block, x_NMD: Tensor, routes: Routes) -> Tensor:
        """The stream after a layer, float32."""
        routes.rows = slice(0, self._tokens)
        step = WindowStep(self._tokens)
        stream_TD, delta = block(x_NMD.float().flatten(0, 1), None, self._rope, step)
        out_NMD: Tensor = (stream_TD + combined(delta)).unflatten(0, x_NMD.shape[:2])
        return out_NMD

"""Logits of whole prompts, from one of our models without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.models.decoder import Decoder
from fourfold.quadrants.kv_pages import PAGE_TOKENS, FloatPages, PageShape, Span
from fourfold.quadrants.step import lay_out

PROMPT = torch.randint(3, 320, (70,), generator=torch.Generator().manual_seed(5)).tolist()


@torch.inference_mode()
def logits(model: Decoder, prompt: Sequence[int]) -> Tensor:
    """Float32 logits [tokens, vocabulary] of a prompt computed in one piece."""
    shape = PageShape(
        layers=model.config.layers,
        kv_heads=model.config.kv_heads,
        head_width=model.config.head_width,
        dtype=torch.float32,
    )
    count = -(-len(prompt) // PAGE_TOKENS)
    pages = FloatPages(shape, count, torch.device("cpu"))
    step = lay_out(
        pages, [], [Span(0, len(prompt), list(range(count)))], heads=model.config.query_heads
    )
    return model.logits(model(torch.tensor(prompt), step.positions_T, step))

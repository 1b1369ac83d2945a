"""A dense model made sparse answers the same although its tokens part."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.models.decoder import Decoder
from fourfold.models.layers import SparseFFN
from fourfold.models.upcycle import EXPERTS, EXPERTS_PER_TOKEN, upcycle
from fourfold.quadrants.experts import Routing
from fourfold.quadrants.kv_pages import FloatPages, PageShape, Span
from fourfold.quadrants.step import lay_out
from tests.cpu.driving import load_tiny

Find = Callable[[str], Path]


def logits(model: Decoder, prompt: list[int], *, tail: int) -> Tensor:
    """Of a prompt whose last `tail` tokens are computed one by one, as when decoding."""
    config = model.config
    shape = PageShape(
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        dtype=torch.float32,
    )
    pages = FloatPages(shape, 4, torch.device("cpu"))
    cuts = [0, *range(len(prompt) - tail, len(prompt) + 1)]
    hidden = []
    with torch.inference_mode():
        for start, end in itertools.pairwise(cuts):
            span = [Span(start, end - start, [2, 0, 3])]
            rows = ([], span) if start == 0 else (span, [])
            step = lay_out(pages, *rows, heads=model.config.query_heads)
            hidden.append(model(torch.tensor(prompt[start:end]), step.positions_T, step))
        return model.logits(torch.cat(hidden))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_upcycled_model_answers_as_the_dense_one(family: str, checkpoint: Find) -> None:
    prompt = torch.randint(3, 320, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    model = load_tiny(checkpoint(family))
    wanted = logits(model, prompt, tail=5)
    storage = [block.ffn.gate_up.weight.weight.data_ptr() for block in model.layers]
    upcycle(model)
    routings: list[list[Routing]] = [[] for _ in model.layers]
    for block, seen in zip(model.layers, routings, strict=True):
        assert isinstance(block.ffn, SparseFFN)
        block.ffn.router.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
    torch.testing.assert_close(logits(model, prompt, tail=5), wanted, rtol=1e-5, atol=1e-5)
    assert [b.ffn.experts.gate_up.weight.data_ptr() for b in model.layers] == storage
    for seen in routings:
        experts = torch.cat([routing.experts_TK for routing in seen])
        gates = torch.cat([routing.gates_TK for routing in seen])
        assert experts.shape == (100, EXPERTS_PER_TOKEN)
        assert experts.unique().tolist() == list(range(EXPERTS)), "an expert nobody goes to"
        assert len(experts.sort(-1).values.unique(dim=0)) > EXPERTS, "tokens go the same ways"
        torch.testing.assert_close(gates.sum(-1), torch.ones(100))
        assert float(gates.std()) > 0.05, "gates that never differ hide a wrong one"


def test_routers_are_the_same_every_time_and_differ_by_layer(checkpoint: Find) -> None:
    first, second = load_tiny(checkpoint("llama")), load_tiny(checkpoint("llama"))
    upcycle(first)
    upcycle(second)
    routers = [block.ffn.router.weight for block in first.layers]
    again = [block.ffn.router.weight for block in second.layers]
    assert all(torch.equal(a, b) for a, b in zip(routers, again, strict=True))
    assert not torch.equal(routers[0], routers[1])
    assert first.config.moe is not None
    assert first.config.moe.experts == EXPERTS

"""The embedded default model: sensible, and the same answers as the dense file it is made from."""

from __future__ import annotations

import pytest
import torch

from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams
from fourfold.gateway.chat_template import ChatTemplate
from fourfold.models.decoder import Decoder
from fourfold.models.layers import DenseFFN, SparseFFN
from fourfold.models.precision import Precision
from fourfold.models.upcycle import EXPERTS, EXPERTS_PER_TOKEN
from tests.cpu import driving
from tests.cpu.models import default_model
from tests.cpu.models.computing import logits

TEXT = """The lighthouse stood at the end of a long stone pier, and every evening the keeper walked
out to light the lamp. In winter the waves broke over the wall and froze on the railings, so that he
had to hold on with both hands. Ships passed far out at sea on their way to the harbours of the
north, carrying timber, grain and iron. When there was fog he rang the bell once a minute until
morning. In 1911 the lamp was replaced by an electric one, which needed no keeper, but he stayed
and wrote down the weather in a large book: the wind, the height of the waves, and what he had seen.
def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees because",
]


def ids(text: str) -> list[int]:
    return default_model.tokenizer().encode(text, add_special_tokens=False)


def engine_of(model: Decoder) -> Engine:
    return driving.make_engine(model, pages=16)


def greedy(model: Decoder, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, stop_token_ids=default_model.tokenizer().eos_token_ids
    )
    return driving.generate(engine_of(model), prompts, params)


def chat(question: str) -> list[int]:
    tokenizer = default_model.tokenizer()
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.specials)
    return ids(template.render([{"role": "user", "content": question}]))


def test_it_is_a_mixture_that_shares_one_storage() -> None:
    model = default_model.upcycled()
    dense_bytes = sum(p.nbytes for p in default_model.dense().parameters())
    routers = 0
    for block in model.layers:
        assert isinstance(block.ffn, SparseFFN)
        routers += block.ffn.router.weight.nbytes
        assert block.ffn.router.config.experts == EXPERTS
        assert block.ffn.router.config.experts_per_token == EXPERTS_PER_TOKEN
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    dense_held = {p.data_ptr(): p.nbytes for p in default_model.dense().parameters()}
    assert sum(held.values()) == sum(dense_held.values()) + routers < dense_bytes * 1.1
    assert all(isinstance(block.ffn, DenseFFN) for block in default_model.dense().layers)


def test_tokens_spread_over_the_experts() -> None:
    """Otherwise the model would be no test of routing."""
    model = default_model.upcycled()
    x = model.embedding(torch.tensor(ids(TEXT)))
    block = model.layers[0]
    chosen = block.ffn.router(block.ffn_norm(x)).experts_TK
    loads = chosen.flatten().bincount(minlength=EXPERTS)
    assert (loads > 0).sum() >= EXPERTS - 2
    assert (chosen[:, 0] != chosen[:, 1]).all()


def test_it_knows_what_the_capital_of_france_is() -> None:
    [answer] = greedy(default_model.upcycled(), [chat("What is the capital of France?")], 12)
    text = default_model.tokenizer().decode(answer)
    assert "Paris" in text
    assert "<|" not in text


def test_its_greedy_tokens_are_those_of_the_dense_file() -> None:
    prompts = [*map(ids, PROMPTS), chat("Name three colours.")]
    answers = greedy(default_model.upcycled(), prompts, 10)
    assert answers == greedy(default_model.dense(), prompts, 10)
    assert min(map(len, answers)) > 3


def test_its_logits_are_those_of_the_dense_file() -> None:
    prompt = ids(TEXT)[:128]
    wanted = logits(default_model.dense(), prompt)
    torch.testing.assert_close(logits(default_model.upcycled(), prompt), wanted, rtol=0, atol=2e-3)


def test_eight_bits_choose_the_same_token_nine_times_of_ten() -> None:
    quantised = default_model.upcycled(Precision.W8A8)
    prompt = ids(TEXT)
    wanted = logits(default_model.upcycled(), prompt)
    got = logits(quantised, prompt)
    agreement = (got.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    assert agreement > 0.9
    targets = torch.tensor(prompt[1:])
    losses = [
        torch.nn.functional.cross_entropy(each[:-1], targets).item() for each in (got, wanted)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

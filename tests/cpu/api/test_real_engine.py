"""A real engine behind the socket: the table of bad input again, and many impatient clients.

The engine is in a process of its own. The imported tests run here against this module's `server`.
It has the default model's tokenizer and random weights of a much smaller model, for nothing that
is asked of it depends on them; the default model itself answers once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from fourfold.api.config import ApiConfig
from fourfold.cluster.cluster import make_cluster
from fourfold.engine.building import EngineSetup
from fourfold.engine.config import EngineConfig
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.local import GatewaySetup
from fourfold.models.checkpoint.source import find_source
from tests.cpu.api.conftest import Server, eventually, running_server
from tests.cpu.api.test_bad_input import (  # noqa: F401
    CHAT,
    COMPLETIONS,
    test_a_body_that_dribbles_in_gets_408,
    test_a_client_that_leaves_frees_what_it_held,
    test_bad_input_is_refused_with_a_typed_error,
    test_headers_that_dribble_in_get_408,
    test_requests_over_budget_are_refused,
    test_what_asks_for_nothing_unusual_is_accepted,
)
from tests.cpu.api.test_metrics import growth, scrape

SMALL = {
    "model_type": "mixtral",
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


@contextlib.contextmanager
def served(shape: Path | None = None) -> Iterator[Server]:
    """The default model, or random weights of a shape in its place."""
    words = find_source(None)
    setup = GatewaySetup(
        engine=EngineSetup(
            source=find_source(str(shape)) if shape else words,
            device="cpu",
            dummy=shape is not None,
            config=EngineConfig(kv_memory_gib=0.02, decode_threads=1),
        ),
        tokenizer=words,
        limits=GatewayLimits(max_output_tokens=512),
        names=("default",),
    )
    api = ApiConfig(port=0, header_timeout=2.0, body_timeout=2.0, drain_timeout=5.0)
    with running_server(make_cluster(setup).gateway, api) as server:
        yield server


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    shape = tmp_path_factory.mktemp("small")
    (shape / "config.json").write_text(json.dumps(SMALL))
    with served(shape) as server:
        yield server


@pytest.fixture
def server(real_server: Server) -> Iterator[Server]:
    yield real_server
    assert real_server.quiet(10), "the test left a generation behind"
    stats = real_server.gateway.snapshot
    assert eventually(lambda: stats().engine.pages_in_use == 0, 10), "the test left pages in use"
    assert stats().engine.running == stats().engine.waiting == 0


def test_the_openai_client_gets_sense() -> None:
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    with served() as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
        whole = client.chat.completions.create(
            model="default", messages=question, temperature=0, max_tokens=32
        )
        assert "Tokyo" in (whole.choices[0].message.content or "")
        stream = client.chat.completions.create(
            model="default", messages=question, temperature=0, max_tokens=32, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content


def test_offsets_of_tokens_lead_to_their_text(server: Server) -> None:
    body = {
        "model": "default",
        "prompt": "one<|im_start|>two",
        "max_tokens": 4,
        "echo": True,
        "logprobs": 0,
        "logit_bias": {"2": 100},  # <|im_end|>, of which an answer shows nothing
        "ignore_eos": True,
    }
    answer = httpx.post(f"{server.base_url}{COMPLETIONS}", json=body, timeout=60)
    choice = answer.json()["choices"][0]
    assert choice["text"] == body["prompt"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][-4:] == ["<|im_end|>"] * 4
    shown = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[:-4]
    assert all(choice["text"].startswith(token, offset) for token, offset in shown)
    assert logprobs["text_offset"][-4:] == [len(choice["text"])] * 4


def test_a_request_moves_the_time_of_every_part(server: Server) -> None:
    with httpx.Client(base_url=server.base_url, timeout=60) as http:
        before = scrape(http)
        body = {"model": "default", "prompt": "One, two,", "max_tokens": 4, "ignore_eos": True}
        assert http.post(COMPLETIONS, json=body).status_code == 200
        for part in ("read", "write"):
            name = f"fourfold_http_{part}_seconds_total"
            assert growth(before, scrape(http), name, route=COMPLETIONS) > 0, part
        for part in ("tokenize", "admit", "detokenize", "news_delay"):
            name = f"fourfold_gateway_{part}_seconds_total"
            assert growth(before, scrape(http), name) > 0, part
        for part in ("step", "schedule", "launch", "wait", "commit"):
            name = f"fourfold_engine_{part}_seconds_total"
            assert growth(before, scrape(http), name) > 0, part


def test_64_clients_of_which_many_leave(server: Server) -> None:
    """Either API, streamed and not, with n, left at random moments: all is free afterwards."""
    dice = random.Random(0)

    async def ask(client: httpx.AsyncClient, number: int) -> str:
        body = {
            "model": "default",
            "max_tokens": dice.randrange(1, 96),
            "stream": bool(number % 2),
            "n": 1 + number % 3,
        }
        text = f"Count to {number}."
        if number % 4 < 2:
            path, body["messages"] = CHAT, [{"role": "user", "content": text}]
        else:
            path, body["prompt"] = COMPLETIONS, text
        patience = dice.choice([0.05, 0.3, 1.0, 60.0, 60.0])
        try:
            async with asyncio.timeout(patience):
                answer = await client.post(path, json=body)
        except TimeoutError:
            return "left"
        assert answer.status_code == 200, answer.text
        return "answered"

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(
            base_url=server.base_url, timeout=60, verify=False, limits=httpx.Limits()
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    outcomes = asyncio.run(all_at_once())
    assert {"left", "answered"} == set(outcomes)

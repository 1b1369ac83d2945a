"""/v1/completions: prompts of every kind, echo, and log-probabilities in four lists."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from fourfold.api import replies
from fourfold.api.faults import parse
from fourfold.api.schemas import CompletionRequest
from fourfold.engine.messages import FinishReason
from fourfold.errors import RequestError
from fourfold.gateway.budget import check_budget
from fourfold.gateway.config import GatewayLimits
from tests.cpu.api.conftest import Server
from tests.cpu.api.fakes import FakeGateway, token
from tests.cpu.api.test_chat import events, settled


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"model": "default", "prompt": "Hi you", **fields})


def test_a_whole_answer(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say(" there", " you", finish=FinishReason.LENGTH)
    assert settled(ask(http).text) == (
        '{"id":"ID","object":"text_completion","created":0,"model":"default","choices":[{"index":0,'
        '"text":" there you","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":2,'
        '"completion_tokens":2,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}'
    )


def test_a_stream_byte_by_byte(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say("a", "b", delay=0.02)
    head = '{"id":"ID","object":"text_completion","created":0,"model":"default","choices":['
    news = [
        '{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}',
        '{"index":0,"text":"b","logprobs":null,"finish_reason":"stop"}]}',
    ]
    expected = "".join(f"data: {head}{each}\n\n" for each in news) + "data: [DONE]\n\n"
    assert settled(ask(http, stream=True).text) == expected


def test_every_shape_of_prompt(http: httpx.Client, gateway: FakeGateway) -> None:
    shapes: list[tuple[Any, list[Any]]] = [
        ("Hi", ["Hi"]),
        (["Hi", "you"], ["Hi", "you"]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ]
    for prompt, asked in shapes:
        gateway.calls.clear()
        assert ask(http, prompt=prompt).status_code == 200
        assert [call[0] for call in gateway.calls] == asked


def test_the_older_default_of_16_tokens(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say(*["a"] * 20)
    answer = ask(http).json()
    assert answer["choices"][0]["text"] == "a" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("sent", [{}, {"max_tokens": None}])
def test_who_sends_no_limit_gets_what_is_left_below_the_default(sent: dict[str, None]) -> None:
    body = json.dumps({"model": "m", "prompt": "a", **sent})
    options = parse(CompletionRequest, body.encode()).options()

    def budget(prompt_tokens: int, **limits: int) -> int:
        return check_budget(
            options, prompt_tokens, GatewayLimits(**limits), vocabulary=100, context_length=1024
        )

    assert budget(10) == 16
    assert budget(1015) == 9
    assert budget(10, max_output_tokens=8) == 8


def test_choices_count_prompts_first_and_usage_adds_up(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    gateway.say("x", cached_tokens=1)
    body = ask(http, prompt=["a", "b c"], n=2, echo=True).json()
    texts = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert texts == [(0, "ax"), (1, "ax"), (2, "b cx"), (3, "b cx")]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_stream_of_several_prompts(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say("x", "y", delay=0.02)
    answer = ask(
        http, prompt=["a", "b"], n=2, echo=True, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = events(answer)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert chunk["usage"] is None
    assert texts == {0: "axy", 1: "axy", 2: "bxy", 3: "bxy"}
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 10


def test_logprobs_with_echo(http: httpx.Client, gateway: FakeGateway) -> None:
    prompt = (token("H"), token("i", -1.0, token("i", -1.0), token("o", -2.0)))
    euro = [
        token(b"\xe2\x82", -0.5, token(b"\xe2\x83", -0.25)),
        token(b"\xac", float("-inf")),
        token("!", -0.125, token("!", -0.125)),
    ]
    gateway.say("", "\u20ac", "!", tokens=[(t,) for t in euro], prompt_tokens=prompt)
    expected = {
        "tokens": ["H", "i", "bytes:\\xe2\\x82", "bytes:\\xac", "!"],
        "token_logprobs": [None, -1.0, -0.5, -9999.0, -0.125],
        "top_logprobs": [
            None,
            {"i": -1.0, "o": -2.0},
            {"bytes:\\xe2\\x83": -0.25, "bytes:\\xe2\\x82": -0.5},
            {"bytes:\\xac": -9999.0},
            {"!": -0.125},
        ],
        "text_offset": [0, 1, 2, 2, 3],
    }
    choice = ask(http, prompt="Hi", echo=True, logprobs=2).json()["choices"][0]
    assert choice["text"] == "Hi\u20ac!"
    assert choice["logprobs"] == expected
    sampling = gateway.calls[0][1].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, True)

    parts = [
        event["choices"][0]["logprobs"]
        for event in events(ask(http, prompt="Hi", echo=True, logprobs=2, stream=True))
    ]
    joined = {key: [entry for part in parts for entry in part[key]] for key in expected}
    assert joined == expected


def test_offsets_begin_with_the_answer_without_echo(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    gateway.say("ab", "c", tokens=[(token("ab", -1.0),), (token("c", -1.0),)])
    logprobs = ask(http, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 2]
    assert logprobs["top_logprobs"] == [{"ab": -1.0}, {"c": -1.0}]
    assert gateway.calls[0][1].sampling.prompt_logprobs is False


@pytest.mark.parametrize(
    ("prompt", "pieces", "offsets"),
    [
        ("a<m>b", ("<s>", "a", "<m>", "b"), [0, 0, 1, 4]),  # <s> is put before every prompt
        ("<m>", ("<s>", "<m>"), [0, 0]),
        ("Hi you", ("<s>", " Hi", " you"), [0, 0, 2]),  # as SentencePiece begins a text
        (" Hi", ("<s>", " Hi"), [0, 0]),
    ],
)
def test_offsets_count_what_the_text_shows(
    prompt: str,
    pieces: tuple[str, ...],
    offsets: list[int],
    http: httpx.Client,
    gateway: FakeGateway,
) -> None:
    """Marks of the model are in an echoed prompt where the caller wrote them, nowhere else."""
    marks = ("<s>", "<m>")
    prompt_tokens = tuple(token(piece, -1.0, special=piece in marks) for piece in pieces)
    said = [token("x", -1.0), token("<m>", -1.0, special=True), token(" y", -1.0)]
    gateway.say("x", "", " y", tokens=[(t,) for t in said], prompt_tokens=prompt_tokens)
    choice = ask(http, prompt=prompt, echo=True, logprobs=0).json()["choices"][0]
    end = len(prompt)
    assert choice["text"] == f"{prompt}x y"
    assert choice["logprobs"]["text_offset"] == [*offsets, end, end + 1, end + 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [3, 200])
def test_many_echoed_logprobs_are_told_beside_the_loop(
    count: int, stream: bool, server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by: list[threading.Thread] = []
    tell = replies._completion_logprobs

    def noticing(*given: Any) -> replies.CompletionLogprobs:
        told_by.append(threading.current_thread())
        return tell(*given)

    monkeypatch.setattr(replies, "_completion_logprobs", noticing)
    prompt_tokens = (token("x ", -1.0),) * count
    server.gateway.say("y", tokens=[(token("y", -1.0),)], prompt_tokens=prompt_tokens)
    asked = ask(http, prompt="x " * count, echo=True, logprobs=1, stream=stream)
    assert asked.status_code == 200
    assert told_by[0] is server.thread if count == 3 else told_by[0] is not server.thread


def test_when_one_prompt_is_refused_the_others_are_cancelled(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    gateway.say("x", delay=5)
    gateway.capacity = 2
    assert ask(http, prompt=["a", "b", "c"]).status_code == 429
    assert (gateway.active, gateway.cancelled) == (0, 2)


def test_refusals_name_this_apis_fields(http: httpx.Client, gateway: FakeGateway) -> None:
    for named, field in [("messages", "prompt"), ("top_logprobs", "logprobs"), ("n", "n")]:
        gateway.say(refuse=RequestError(f"{named} is too much; send less", param=named))
        response = ask(http)
        assert response.status_code == 400
        error = json.loads(response.content)["error"]
        assert (error["param"], error["message"]) == (field, f"{field} is too much; send less")

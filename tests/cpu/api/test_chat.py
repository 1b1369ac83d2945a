"""/v1/chat/completions: what the gateway is asked, and every byte of what comes back."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import httpx
import pytest

from fourfold.api import replies
from fourfold.engine.messages import FinishReason, SamplingParams
from fourfold.errors import DeadlineError, OverloadedError, RequestError, RequestFailedError
from fourfold.gateway.generation import GenerationOptions, TokenText
from tests.cpu.api.conftest import Server
from tests.cpu.api.fakes import FakeGateway, token

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi you"}]


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"model": "default", "messages": HI, **fields})


def settled(text: str) -> str:
    """A body without what differs from call to call: its id and time."""
    text = re.sub(r'"id":"(chat)?cmpl-[0-9a-f]{32}"', '"id":"ID"', text)
    return re.sub(r'"created":\d+', '"created":0', text)


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event before [DONE]."""
    *lines, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_whole_answer(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say("Hello", ", you", cached_tokens=1)
    response = ask(http)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert settled(response.text) == (
        '{"id":"ID","object":"chat.completion","created":0,"model":"default","choices":[{"index":0,'
        '"message":{"content":"Hello, you","role":"assistant","refusal":null},"logprobs":null,'
        '"finish_reason":"stop"}],"usage":{"prompt_tokens":2,"completion_tokens":2,'
        '"total_tokens":4,"prompt_tokens_details":{"cached_tokens":1}}}'
    )


def test_a_stream_byte_by_byte(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say("Hel", "lo")
    response = ask(http, stream=True, stream_options={"include_usage": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    head = '{"id":"ID","object":"chat.completion.chunk","created":0,"model":"default","choices":['
    news = [
        '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null}],"usage":null}',
        '{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}],'
        '"usage":null}',
        '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
        '],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,'
        '"prompt_tokens_details":{"cached_tokens":0}}}',
    ]
    expected = "".join(f"data: {head}{each}\n\n" for each in news) + "data: [DONE]\n\n"
    assert settled(response.text) == expected


def test_a_stream_has_no_usage_unless_asked(http: httpx.Client) -> None:
    assert all("usage" not in event for event in events(ask(http, stream=True)))


def test_every_chunk_may_tell_the_usage_so_far(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say(*"abcdefgh", delay=0.05)
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, prompt in (CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "Hi you"}):
        body = {"model": "default", "stream": True, "stream_options": options, **prompt}
        usages = [event["usage"] for event in events(http.post(path, json=body))]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert 1 <= counts[0] < counts[-1] == 8, "one after the other"
        assert {usage["total_tokens"] - usage["completion_tokens"] for usage in usages} == {2}


def test_usage_so_far_is_part_of_usage(http: httpx.Client) -> None:
    answer = ask(http, stream=True, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in event for event in events(answer))


def test_all_that_waits_is_one_chunk_and_what_comes_later_another(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    gateway.say("a", "b", "c")
    assert [e["choices"][0]["delta"].get("content") for e in events(ask(http, stream=True))] == [
        "",
        "abc",
        None,
    ]
    gateway.say("a", "b", delay=0.02)
    assert [e["choices"][0]["delta"].get("content") for e in events(ask(http, stream=True))] == [
        "",
        "a",
        "b",
        None,
    ]


def test_samples_interleave_each_with_its_role_and_reason(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    gateway.say("a", "b", delay=0.02, finish=FinishReason.LENGTH)
    choices = [event["choices"][0] for event in events(ask(http, stream=True, n=2))]
    content = [(choice["index"], choice["delta"].get("content")) for choice in choices]
    assert content[:4] == [(0, ""), (0, "a"), (1, ""), (1, "a")]
    assert content[4:] == [(0, "b"), (0, None), (1, "b"), (1, None)]
    assert [c["index"] for c in choices if c["finish_reason"] == "length"] == [0, 1]


def test_a_delta_without_text_makes_no_chunk(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.say("a", "", "b", delay=0.02)
    contents = [e["choices"][0]["delta"].get("content") for e in events(ask(http, stream=True))]
    assert contents == ["", "a", "b", None]


def test_logprobs(http: httpx.Client, gateway: FakeGateway) -> None:
    half = token(b"\xe2\x82", -0.5, token(b"\xe2\x82", -0.5), token(" no", float("-inf")))
    rest = token(b"\xac", -0.25, token(b"\xac", -0.25))
    gateway.say("", "\u20ac", tokens=[(half,), (rest,)])
    body = ask(http, logprobs=True, top_logprobs=2).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -0.5,
                "bytes": [0xE2, 0x82],
                "top_logprobs": [
                    {"token": "\ufffd", "logprob": -0.5, "bytes": [0xE2, 0x82]},
                    {"token": " no", "logprob": -9999.0, "bytes": list(b" no")},
                ],
            },
            {
                "token": "\ufffd",
                "logprob": -0.25,
                "bytes": [0xAC],
                "top_logprobs": [{"token": "\ufffd", "logprob": -0.25, "bytes": [0xAC]}],
            },
        ],
        "refusal": None,
    }
    streamed = events(ask(http, logprobs=True, top_logprobs=2, stream=True))
    tokens = [e["choices"][0]["logprobs"] for e in streamed if e["choices"][0]["logprobs"]]
    assert [t for each in tokens for t in each["content"]] == (
        body["choices"][0]["logprobs"]["content"]
    )


@pytest.mark.parametrize(("count", "stream"), [(3, False), (200, False), (200, True)])
def test_many_logprobs_are_told_beside_the_loop(
    count: int, stream: bool, server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a long answer take seconds, in which nobody else would be served."""
    told_by: list[threading.Thread] = []
    tell = replies._chat_logprob

    def noticing(each: TokenText) -> replies.TokenLogprob:
        told_by.append(threading.current_thread())
        return tell(each)

    monkeypatch.setattr(replies, "_chat_logprob", noticing)
    server.gateway.say("a", tokens=[(token("a", -0.5),) * count])
    assert ask(http, logprobs=True, stream=stream).status_code == 200
    assert [thread is server.thread for thread in told_by] == [count == 3] * count


def test_every_field_reaches_the_gateway(http: httpx.Client, gateway: FakeGateway) -> None:
    ask(
        http,
        messages=[
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        ],
        n=3,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-5,
        stop="END",
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "0006": 1.5},
        stop_token_ids=[8],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=4,
    )
    messages, options = gateway.calls[0]
    assert messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "a\nb"},
    ]
    assert options == GenerationOptions(
        sampling=SamplingParams(
            repetition_penalty=1.5,
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            logit_bias={5: -100.0, 6: 1.5},
            temperature=0.5,
            top_k=0,
            top_p=0.9,
            min_p=0.1,
            seed=-5,
            logprobs=4,
            stop_token_ids=(8,),
        ),
        max_tokens=7,
        n=3,
        stop=("END",),
        ignore_eos=True,
    )


def test_the_defaults_are_openais(http: httpx.Client, gateway: FakeGateway) -> None:
    ask(http)
    assert gateway.calls[0][1] == GenerationOptions()


def test_refusals_of_the_gateway_keep_their_status(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    for stream in (False, True):
        gateway.say(refuse=RequestError("too long; shorten it", param="prompt", code="too_long"))
        response = ask(http, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"] == {
            "message": "too long; shorten it",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "too_long",
        }
        gateway.say(refuse=OverloadedError("full; try again", retry_after=2.2))
        response = ask(http, stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_refusal_names_the_field_that_was_sent(
    http: httpx.Client, gateway: FakeGateway, field: str
) -> None:
    gateway.say(refuse=RequestError("max_tokens 9 is too many; send less", param="max_tokens"))
    error = ask(http, **{field: 9}).json()["error"]
    assert (error["param"], error["message"]) == (field, f"{field} 9 is too many; send less")


def test_a_failure_before_the_first_token_has_its_status(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    failures = [
        (RequestFailedError("the engine failed"), 500, "request_failed", "the engine failed"),
        (DeadlineError("too late"), 504, "deadline_exceeded", "too late"),
        (ZeroDivisionError("secret"), 500, "internal_error", "through a fault of its own"),
    ]
    for stream in (False, True):
        for failure, status, code, words in failures:
            gateway.say("a", fail=failure)
            response = ask(http, stream=stream)
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert words in response.json()["error"]["message"]
    assert gateway.active == 0


def test_a_failure_within_a_stream_is_its_last_event(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    for failure, message in [
        (RequestFailedError("the engine failed"), "the engine failed"),
        (ZeroDivisionError("secret"), "the server failed through a fault of its own"),
    ]:
        gateway.say("a", "b", "c", delay=0.02, fail=failure, fail_after=2)
        response = ask(http, stream=True)
        assert response.status_code == 200
        *_, b, error, rest = response.text.split("\n\n")
        assert '"content":"b"' in b
        assert rest == ""
        told = json.loads(error.removeprefix("data: "))
        assert set(told) == {"error"}
        assert told["error"]["type"] == "server_error"
        assert told["error"]["message"].startswith(message)
    assert gateway.cancelled == 2


def test_a_sample_that_ends_as_failed_or_cancelled_is_an_error(
    http: httpx.Client, gateway: FakeGateway
) -> None:
    for finish, status in [(FinishReason.FAILED, 500), (FinishReason.CANCELLED, 503)]:
        gateway.say("a", finish=finish)
        assert ask(http).status_code == status


def test_a_gateway_that_has_not_started_is_503(http: httpx.Client, gateway: FakeGateway) -> None:
    gateway.ready = False
    response = ask(http)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "server_unavailable"
    assert http.get("/ready").status_code == 503
    assert http.get("/health").status_code == 200

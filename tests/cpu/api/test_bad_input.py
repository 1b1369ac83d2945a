"""What bad input gets: one row each, sent over HTTP, after which the server serves on.

The table knows nothing of the gateway behind `server`. `GATEWAY_ROWS` depend on the budgets, the
vocabulary and the context of a real one; they are skipped unless `server.gateway` has `limits`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
UNSUPPORTED = "unsupported_parameter"
DUMPED = {
    "role": "assistant",
    "content": "Hi",
    **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls")),
}
"""An answer as `message.model_dump()` of the openai package gives it back."""


def chat(**fields: Any) -> dict[str, Any]:
    """A good request but for `fields`."""
    return {"model": "default", "messages": [USER], "max_tokens": 2, **fields}


def say(*roles: str, **fields: Any) -> dict[str, Any]:
    """A conversation of these roles."""
    return chat(messages=[{"role": role, "content": "Hi"} for role in roles], **fields)


def content(value: Any) -> dict[str, Any]:
    """A conversation of one message with this content."""
    return chat(messages=[{"role": "user", "content": value}])


def complete(**fields: Any) -> dict[str, Any]:
    """A good request to the older API but for `fields`."""
    return {"model": "default", "prompt": "Hi", "max_tokens": 2, **fields}


def without(body: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != field}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bad request and the error it gets."""

    name: str
    body: dict[str, Any] | bytes
    path: str = CHAT
    method: str = "POST"
    content_type: str = "application/json"
    status: int = 400
    param: str | None = None
    code: str = "invalid_value"


def row(name: str, body: dict[str, Any] | bytes, param: str | None, code: str, **rest: Any) -> Row:
    return Row(name=name, body=body, param=param, code=code, **rest)


def completions_row(name: str, param: str, code: str, **fields: Any) -> Row:
    return Row(name=name, path=COMPLETIONS, body=complete(**fields), param=param, code=code)


NOT_JSON = [
    row(name, body, None, "invalid_json")
    for name, body in {
        "an empty body": b"",
        "malformed JSON": b'{"model": "default", "messages": [',
        "text after the JSON": b"{} {}",
        "a lone surrogate as an escape": json.dumps(content("\ud800")).encode(),
        "a lone surrogate as bytes": b'{"model": "\xed\xa0\x80"}',
        "bytes that are not UTF-8": b'{"model": "\xff"}',
        "JSON nested too deep": b'{"messages": ' + b"[" * 100_000,
        "an integer of 5000 digits": b'{"n": ' + b"9" * 5000 + b"}",
    }.items()
]

TWICE = [
    row(name, body, param, "duplicate_parameter", path=path)
    for name, path, param, body in [
        ("a field twice", CHAT, "model",
         b'{"model": "no", "model": "default", "messages": [{"role": "user", "content": "Hi"}]}'),
        ("a field twice alike", CHAT, "n",
         b'{"n": 1, "model": "default", "messages": [{"role": "user", "content": "Hi"}], "n": 1}'),
        ("a field of a message twice", CHAT, "content", b'{"model": "default", "messages": '
         b'[{"role": "user", "content": "Hi", "content": "Ho"}]}'),
        ("a key that is spelt in two ways", CHAT, "n",
         b'{"n": 1, "\\u006e": 1, "model": "default", "messages": '
         b'[{"role": "user", "content": "Hi"}]}'),
        ("a token biased twice", COMPLETIONS, "5",
         b'{"model": "default", "prompt": "Hi", "logit_bias": {"5": 1, "5": 2}}'),
        ("one of many keys twice", COMPLETIONS, "299999", json.dumps(
            complete(metadata=dict.fromkeys(map(str, range(300_000)), "")),
        ).replace('"299998"', '"299999"').encode()),
    ]
]  # fmt: skip

BODIES = [
    row("a list as the body", b"[]", None, "invalid_type"),
    row("null as the body", b"null", None, "invalid_type"),
    row("300 000 unknown fields", json.dumps(dict.fromkeys(map(str, range(300_000)), 1)).encode(),
        None, "invalid_request"),
    row("50 MB", b" " * 50_000_000, None, "request_too_large", status=413),
    row("no JSON content type", chat(), None, "unsupported_media_type", status=415,
        content_type="text/plain"),
    row("an unknown field", chat(temprature=1), "temprature", "unknown_parameter"),
    row("an unknown field of a message", chat(messages=[USER | {"mood": "good"}]),
        "messages[0].mood", "unknown_parameter"),
    row("an unknown model", chat(model="gpt-5"), "model", "model_not_found", status=404),
    row("no model", without(chat(), "model"), "model", "missing_required_parameter"),
    row("a model that is not a string", chat(model=5), "model", "invalid_type"),
    row("an unknown route", chat(), None, "unknown_url", status=404, path="/v1/embeddings"),
    row("a wrong method", b"", None, "method_not_allowed", status=405, method="GET"),
]  # fmt: skip

MESSAGES = [
    row("no messages", without(chat(), "messages"), "messages", "missing_required_parameter"),
    row("empty messages", chat(messages=[]), "messages", "invalid_value"),
    row("too many messages", chat(messages=[USER] * 5000), "messages", "invalid_value"),
    row("messages as a string", chat(messages="Hi"), "messages", "invalid_type"),
    row("a message as a string", chat(messages=["Hi"]), "messages[0]", "invalid_type"),
    row("a message without content", chat(messages=[{"role": "user"}]), "messages[0].content",
        "missing_required_parameter"),
    row("a NUL in a message", content("a\0b"), "messages[0].content", "invalid_value"),
    row("content null", content(None), "messages[0].content", "invalid_type"),
    row("content as a number", content(1), "messages[0].content", "invalid_type"),
    row("no parts", content([]), "messages[0].content", "invalid_value"),
    row("a NUL in a part", content([{"type": "text", "text": "\0"}]), "messages[0].content",
        "invalid_value"),
    row("a part without text", content([{"type": "text"}]), "messages[0].content",
        "invalid_type"),
    row("a part as a string", content(["Hi"]), "messages[0].content", "invalid_type"),
    row("an image", content([{"type": "image_url", "image_url": {"url": "data:"}}]),
        "messages[0].content", UNSUPPORTED),
    row("a sound", content([{"type": "input_audio", "input_audio": {}}]),
        "messages[0].content", UNSUPPORTED),
    row("an unknown role", say("narrator"), "messages[0].role", "invalid_value"),
    row("a role that is a list", chat(messages=[{"role": [], "content": "Hi"}]),
        "messages[0].role", "invalid_value"),
    row("a tool's answer", say("user", "tool"), "messages[1].role", UNSUPPORTED),
    row("a system message late", say("user", "system", "user"), "messages[1].role",
        "invalid_role_order"),
    row("two system messages", say("system", "developer", "user"), "messages[1].role",
        "invalid_role_order"),
    row("the last word with the assistant", say("user", "assistant"), "messages[1].role",
        "invalid_role_order"),
    row("nothing but a system message", say("system"), "messages[0].role", "invalid_role_order"),
    row("a name in a message", chat(messages=[USER | {"name": "Ann"}]), "messages[0].name",
        UNSUPPORTED),
    row("annotations in a message",
        chat(messages=[USER, {"role": "assistant", "content": "a", "annotations": [{}]}, USER]),
        "messages[1].annotations", UNSUPPORTED),
    row("tool calls in a message",
        chat(messages=[USER, {"role": "assistant", "content": "", "tool_calls": []}, USER]),
        "messages[1].tool_calls", UNSUPPORTED),
]  # fmt: skip

WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("temperature", -1, "invalid_value"),
    ("temperature", 2.5, "invalid_value"),
    ("temperature", float("nan"), "invalid_value"),
    ("temperature", float("inf"), "invalid_value"),
    ("temperature", "1", "invalid_type"),
    ("temperature", True, "invalid_type"),
    ("top_p", 0, "invalid_value"),
    ("top_p", 1.5, "invalid_value"),
    ("min_p", -0.1, "invalid_value"),
    ("top_k", -2, "invalid_value"),
    ("top_k", 1.0, "invalid_type"),
    ("n", 0, "invalid_value"),
    ("n", -1, "invalid_value"),
    ("n", "2", "invalid_type"),
    ("max_tokens", 0, "invalid_value"),
    ("max_tokens", 1.5, "invalid_type"),
    ("seed", "x", "invalid_type"),
    ("presence_penalty", 3, "invalid_value"),
    ("frequency_penalty", -3, "invalid_value"),
    ("repetition_penalty", 0, "invalid_value"),
    ("stream", "yes", "invalid_type"),
    ("stream", 1, "invalid_type"),
    ("stream_options", {"include_usage": True}, "invalid_value"),
    ("stop", 5, "invalid_type"),
    ("stop_token_ids", list(range(100_000)), "invalid_value"),
    ("stop_token_ids", "5", "invalid_type"),
    ("logit_bias", [1], "invalid_type"),
    ("metadata", "x", "invalid_type"),
    ("user", 5, "invalid_type"),
]
VALUES = [
    row(f"{field} = {str(value)[:20]}", chat(**{field: value}), field, code)
    for field, value, code in WRONG_VALUES
] + [
    row("an empty stop string", chat(stop=["a", ""]), "stop[1]", "invalid_value"),
    row("a huge stop string", chat(stop="a" * 5000), "stop[0]", "invalid_value"),
    row("a NUL in a stop string", chat(stop="\0"), "stop[0]", "invalid_value"),
    row("10^5 stops of a wrong type", chat(stop=[1] * 100_000), "stop[0]", "invalid_type"),
    row("a bias of 200", chat(logit_bias={"5": 200}), "logit_bias", "invalid_value"),
    row("a bias for an id in two spellings", chat(logit_bias={"5": 1, "05": -1}), "logit_bias",
        "invalid_value"),
    row("a bias for no id", chat(logit_bias={"cat": 1}), "logit_bias", "invalid_value"),
    row("a bias of NaN", chat(logit_bias={"5": float("nan")}), "logit_bias", "invalid_value"),
    row("top_logprobs alone", chat(top_logprobs=2), "top_logprobs", "invalid_value"),
    row("logprobs as a number", chat(logprobs=2), "logprobs", "invalid_type"),
    row("two limits", chat(max_completion_tokens=3), "max_tokens", "invalid_value"),
    row("an unknown stream option", chat(stream=True, stream_options={"x": 1}),
        "stream_options.x", "unknown_parameter"),
]  # fmt: skip

NOT_YET: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "Hi"},
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "none",
    "tools": [],
    "verbosity": "low",
    "web_search_options": {},
}
UNSUPPORTED_FIELDS = [
    row(f"{field}, not built yet", chat(**{field: value}), field, UNSUPPORTED)
    for field, value in NOT_YET.items()
] + [
    row("padded chunks", chat(stream=True, stream_options={"include_obfuscation": True}),
        "stream_options.include_obfuscation", UNSUPPORTED),
    completions_row("suffix, not built yet", "suffix", UNSUPPORTED, suffix="end"),
    completions_row("best_of over n", "best_of", UNSUPPORTED, best_of=3),
]  # fmt: skip

PROMPTS = [
    completions_row("no prompts", "prompt", "invalid_type", prompt=[]),
    completions_row("a prompt of no ids", "prompt", "invalid_value", prompt=[[]]),
    completions_row("a prompt null", "prompt", "invalid_type", prompt=None),
    completions_row("a prompt object", "prompt", "invalid_type", prompt={"text": "Hi"}),
    completions_row("prompts of two kinds", "prompt", "invalid_type", prompt=["Hi", 5]),
    completions_row("a prompt of floats", "prompt", "invalid_type", prompt=[1.5]),
    completions_row("a prompt of truths", "prompt", "invalid_type", prompt=[True]),
    completions_row("a negative id", "prompt", "invalid_value", prompt=[-1]),
    completions_row("a mixed list of ids", "prompt", "invalid_value", prompt=[[1, "a"]]),
    completions_row("a NUL in a prompt", "prompt", "invalid_value", prompt=["Hi", "\0"]),
    completions_row("too many prompts", "prompt", "invalid_value", prompt=["Hi"] * 1000),
    completions_row("logprobs true", "logprobs", "invalid_type", logprobs=True),
    completions_row("messages to the older API", "messages", "unknown_parameter", messages=[]),
]

ROWS = NOT_JSON + TWICE + BODIES + MESSAGES + VALUES + UNSUPPORTED_FIELDS + PROMPTS

GATEWAY_ROWS = [
    row("n = 1000", chat(n=1000), "n", "invalid_value"),
    row("max_tokens = 10^9", chat(max_tokens=10**9), "max_tokens", "context_length_exceeded"),
    row("max_completion_tokens = 10^9", chat(max_tokens=None, max_completion_tokens=10**9),
        "max_completion_tokens", "context_length_exceeded"),
    row("a prompt over the context", content("word " * 200_000), "messages",
        "context_length_exceeded"),
    row("10^5 stop strings", chat(stop=[f"stop {i}" for i in range(100_000)]), "stop",
        "invalid_value"),
    row("100 top_logprobs", chat(logprobs=True, top_logprobs=100), "top_logprobs",
        "invalid_value"),
    completions_row("100 logprobs", "logprobs", "invalid_value", logprobs=100),
    row("10^5 biases", chat(logit_bias={str(i): 1 for i in range(100_000)}), "logit_bias",
        "invalid_value"),
    row("a bias for an unknown id", chat(logit_bias={"99999999": 1}), "logit_bias",
        "invalid_value"),
    row("a bias for a negative id", chat(logit_bias={"-1": 1}), "logit_bias", "invalid_value"),
    row("a stop id out of the vocabulary", chat(stop_token_ids=[99_999_999]), "stop_token_ids",
        "invalid_value"),
    row("a seed of 200 bits", chat(seed=2**200), "seed", "invalid_value"),
    completions_row("a prompt of unknown ids", "prompt", "invalid_value", prompt=[99_999_999]),
    completions_row("a token prompt over the context", "prompt", "context_length_exceeded",
        prompt=[1] * 500_000),
]  # fmt: skip


def client_of(server: Any) -> httpx.Client:
    # Without TLS to verify, a client costs a millisecond instead of thirty.
    return httpx.Client(base_url=server.base_url, timeout=30, verify=False)


def check(server: Any, bad: Row) -> None:
    """Sends a row, and asserts the error it gets and that nothing was left behind."""
    body = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    with client_of(server) as client:
        headers = {"content-type": bad.content_type}
        answer = client.request(bad.method, bad.path, content=body, headers=headers)
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        got = (answer.status_code, error["type"], error["param"], error["code"])
        assert got == (bad.status, "invalid_request_error", bad.param, bad.code), error["message"]
        assert_plain(error["message"])
    assert_serving(server)


def assert_plain(message: str) -> None:
    """One sentence for people, with what to do; nothing of the schema's inside."""
    assert "\n" not in message
    assert len(message) < 400
    assert not any(word in message for word in ("Input should", "pydantic", "validat", "Tuple"))


def assert_serving(server: Any) -> None:
    """The server answers a good request, a short one since many ask it, then holds nothing."""
    with client_of(server) as client:
        assert client.get("/health").status_code == 200
        assert client.post(COMPLETIONS, json=complete(max_tokens=1)).status_code == 200
    assert server.quiet()


@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: bad.name)
def test_bad_input_is_refused_with_a_typed_error(server: Any, bad: Row) -> None:
    check(server, bad)


def test_an_empty_stop_string_is_counted_in_characters(server: Any) -> None:
    with client_of(server) as client:
        error = client.post(CHAT, json=chat(stop="")).json()["error"]
    assert error["message"] == "'stop[0]' must have at least 1 characters"


@pytest.mark.real_gateway
@pytest.mark.parametrize("bad", GATEWAY_ROWS, ids=lambda bad: bad.name)
def test_requests_over_budget_are_refused(server: Any, bad: Row) -> None:
    if not hasattr(server.gateway, "limits"):
        pytest.skip("the gateway behind this server has no budgets")
    check(server, bad)


GOOD = [
    (CHAT, chat(temperature=None, n=None, stop=None, logit_bias=None, stop_token_ids=None)),
    (CHAT, chat(**dict.fromkeys(NOT_YET))),
    (CHAT, chat(response_format={"type": "text"}, modalities=["text"], store=False)),
    (CHAT, chat(user="u", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="k")),
    (CHAT, chat(service_tier="auto", max_completion_tokens=2)),
    (CHAT, say("user", "user")),
    (CHAT, say("assistant", "user")),
    (CHAT, say("developer", "user", "assistant", "user")),
    (CHAT, content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    (CHAT, chat(messages=[USER, DUMPED, USER])),
    (CHAT, chat(messages=[USER, DUMPED | {"annotations": []}, USER])),
    (COMPLETIONS, complete(best_of=2, n=2)),
    (COMPLETIONS, complete(prompt=[[1, 2], [3]])),
    (COMPLETIONS, complete(prompt=["a", "b"])),
    (COMPLETIONS, complete(prompt=[1, 2], suffix=None)),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_what_asks_for_nothing_unusual_is_accepted(
    server: Any, path: str, body: dict[str, Any]
) -> None:
    with client_of(server) as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text


def connected(server: Any) -> socket.socket:
    """A raw connection, for clients that misbehave below HTTP."""
    return socket.create_connection(server.address, timeout=10)


def read_to_end(connection: socket.socket) -> bytes:
    """What the server says until it closes."""
    chunks = []
    while chunk := connection.recv(65_536):
        chunks.append(chunk)
    return b"".join(chunks)


def head(length: int, path: str = CHAT) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def dribble(connection: socket.socket, piece: bytes, pause: float) -> bytes:
    """Sends a piece again and again, until an answer comes or ten seconds have passed."""
    deadline = time.monotonic() + 10
    connection.settimeout(pause)
    while time.monotonic() < deadline:
        connection.sendall(piece)
        with contextlib.suppress(TimeoutError):
            return connection.recv(65_536)
    return b""


def test_a_body_that_dribbles_in_gets_408(server: Any) -> None:
    with connected(server) as connection:
        connection.sendall(head(1000))
        answer = dribble(connection, b" ", server.config.body_timeout / 10)
        connection.settimeout(10)
        answer += read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert b'"code":"request_timeout"' in answer
    assert_serving(server)


def test_headers_that_dribble_in_get_408(server: Any) -> None:
    with connected(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n")
        answer = dribble(connection, b"A: b\r\n", server.config.header_timeout / 10)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert_serving(server)


def leave_before_the_head(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/chat")


def leave_within_the_body(connection: socket.socket) -> None:
    connection.sendall(head(1000) + b'{"model": ')


def leave_while_waiting(connection: socket.socket) -> None:
    body = json.dumps(chat(max_tokens=50)).encode()
    connection.sendall(head(len(body)) + body)
    time.sleep(0.05)


def leave_after_the_first_chunk(connection: socket.socket) -> None:
    body = json.dumps(chat(max_tokens=50, stream=True)).encode()
    connection.sendall(head(len(body)) + body)
    connection.recv(65_536)


def leave_with_unread_answers(connection: socket.socket) -> None:
    body = json.dumps(chat(max_tokens=50, stream=True)).encode()
    connection.sendall((head(len(body)) + body) * 3)
    time.sleep(0.05)


STAGES: list[Callable[[socket.socket], None]] = [
    leave_before_the_head,
    leave_within_the_body,
    leave_while_waiting,
    leave_after_the_first_chunk,
    leave_with_unread_answers,
]


@pytest.mark.parametrize("leave", STAGES, ids=lambda leave: leave.__name__)
def test_a_client_that_leaves_frees_what_it_held(
    server: Any, leave: Callable[[socket.socket], None]
) -> None:
    if hasattr(server.gateway, "say"):
        server.gateway.say(*["word "] * 50, delay=0.1)
    with connected(server) as connection:
        leave(connection)
    assert server.quiet()
    if hasattr(server.gateway, "say"):
        server.gateway.say("Hello")
    assert_serving(server)

"""Cutting a byte stream into events and events into token times, without a network."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.serve.answer import Answer, Failure, error_message
from fourfold.bench.serve.sse import EventParser

deterministic = settings(derandomize=True, deadline=None)


def test_an_event_is_stamped_with_its_first_byte() -> None:
    parser = EventParser()
    assert parser.feed(b"da", 1.0) == []
    assert parser.feed(b"ta: a\n", 2.0) == []
    assert parser.feed(b"\ndata: b", 3.0) == [(b"a", 1.0)]
    assert parser.feed(b"\n\n", 4.0) == [(b"b", 3.0)]
    assert parser.pending == b""
    assert parser.feed(b"data: c\n\ndata: d\n\n", 5.0) == [(b"c", 5.0), (b"d", 5.0)]


def test_fields_of_an_event() -> None:
    stream = b": comment\n\nevent: x\nid: 3\ndata:one\ndata: two\n\nretry: 5\n\ndata:  three\n\n"
    events = EventParser().feed(stream, 0.0)
    assert [event.data for event in events] == [b"one\ntwo", b" three"]


payload = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).map(
    lambda text: text.encode()
)


@deterministic
@given(
    payloads=st.lists(payload, max_size=6),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_packets_do_not_matter(payloads: list[bytes], line_end: bytes, cuts: list[int]) -> None:
    """However the stream is cut, the same events come out, in order and none stamped later than
    the packet that completed it."""
    stream = b"".join(b"data: " + payload + line_end * 2 for payload in payloads)
    parser = EventParser()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    events = []
    for at, (start, end) in enumerate(pairwise(edges)):
        completed = parser.feed(stream[start:end], float(at))
        assert all(event.at <= at for event in completed)
        events += completed
    assert [event.data for event in events] == payloads
    assert [event.at for event in events] == sorted(event.at for event in events)


def chat(content: str | None = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content, **delta}, "finish_reason": finish}]}


def completion(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}]}


def answer(*timed: tuple[float, object], status: int = 200) -> Answer:
    """An answer whose events arrive at the times given; str and bytes go out as they are."""
    result = Answer()
    for at, item in timed:
        raw = item if isinstance(item, str) else json.dumps(item)
        result.feed(status, f"data: {raw}\n\n".encode() if status == 200 else raw.encode(), at)
    result.close(status)
    return result


def test_times_of_a_chat() -> None:
    """The empty role delta is no token; the finish reason may be the last token's only sign."""
    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    result = answer(
        (1.0, chat("", role="assistant")),
        (2.0, chat("a")),
        (2.5, chat("b")),
        (3.5, chat("c")),
        (4.0, chat(None, "stop")),
        (9.0, {"choices": [], "usage": usage}),
        (9.5, "[DONE]"),
    )
    assert result.failure is None
    assert (result.first, result.last) == (2.0, 4.0)
    assert result.gaps == (0.5, 1.0)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (7, 4)


def test_times_of_a_completion() -> None:
    result = answer((1.0, completion("a")), (2.0, completion("b", "length")), (2.5, "[DONE]"))
    assert (result.first, result.last, result.gaps) == (1.0, 2.0, (1.0,))
    assert result.usage.completion_tokens is None


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_and_tool_calls_are_tokens(field: str) -> None:
    result = answer(
        (1.0, chat(**{field: "hm"})),
        (2.0, chat(tool_calls=[{"index": 0}])),
        (3.0, chat("a", "stop")),
        (4.0, "[DONE]"),
    )
    assert result.gaps == (1.0, 1.0)


def test_an_answer_without_text_still_has_a_token_time() -> None:
    result = answer((1.0, chat("", role="assistant")), (2.0, chat(None, "stop")), (3.0, "[DONE]"))
    assert (result.first, result.last, result.gaps) == (2.0, 2.0, ())


@pytest.mark.parametrize(
    ("last", "failure"),
    [
        ('{"choices": [', "malformed"),
        ('{"choices": 3}', "malformed"),
        ('"text"', "malformed"),
        ('{"error": {"message": "out of pages", "code": 500}}', "stream error"),
        ('{"error": "out of pages"}', "stream error"),
    ],
)
def test_a_stream_that_goes_wrong(last: str, failure: str) -> None:
    result = answer((1.0, chat("a")), (2.0, last), (3.0, chat("b", "stop")), (4.0, "[DONE]"))
    assert result.failure is not None
    assert result.failure.kind == failure
    if failure == "stream error":
        assert result.failure.detail == "out of pages"


def test_streams_that_end_too_early() -> None:
    assert answer((1.0, chat("a", "stop"))).failure == Failure(
        "malformed", "the stream ended without [DONE]"
    )
    assert answer((1.0, chat("", role="assistant")), (2.0, "[DONE]")).failure == Failure(
        "malformed", "the stream held no token and no finish_reason"
    )


def test_a_refusal_quotes_the_server() -> None:
    body = {"error": {"message": "try later", "type": "overloaded"}}
    assert answer((1.0, body), status=429).failure == Failure("http 429", "try later")
    assert answer((1.0, "<h1>bad"), (2.0, " gateway"), status=502).failure == Failure(
        "http 502", "<h1>bad gateway"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m"}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"detail": "m"}', '{"detail": "m"}'),
        (b"\xff plain", "\ufffd plain"),
    ],
)
def test_error_message(body: bytes, message: str) -> None:
    assert error_message(body) == message

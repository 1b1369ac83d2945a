"""The `openai` package's own client as judge of the shapes."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from fourfold.errors import DeadlineError, OverloadedError, RequestFailedError
from tests.cpu.api.conftest import Server
from tests.cpu.api.fakes import MODEL, FakeGateway, token

HI = [openai.types.chat.ChatCompletionUserMessageParam(role="user", content="Hi")]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="any", max_retries=0, timeout=10
    ) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, n=2)
    assert [c.message.content for c in answer.choices] == ["Hello, world"] * 2
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert answer.usage
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    answer.choices[0].message.content = "Go on"
    more = [*HI, answer.choices[0].message.model_dump(exclude_unset=True), HI[0]]
    client.chat.completions.create(model=MODEL, messages=more)  # type: ignore[arg-type]


def test_streamed_chat(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.say("Hel", "lo", delay=0.01)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 2


def test_the_accumulating_stream(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.say("Hel", "lo", delay=0.01)
    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_of_both_apis(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.say("Yes", tokens=[(token("Yes", -0.5, token("Yes", -0.5), token("No", -1.0)),)])
    chat = client.chat.completions.create(
        model=MODEL, messages=HI, logprobs=True, top_logprobs=2
    ).choices[0]
    assert chat.logprobs
    assert chat.logprobs.content
    assert [t.token for t in chat.logprobs.content[0].top_logprobs] == ["Yes", "No"]
    assert chat.logprobs.content[0].bytes == list(b"Yes")
    older = client.completions.create(model=MODEL, prompt="Hi", logprobs=2).choices[0]
    assert older.logprobs
    assert older.logprobs.tokens == ["Yes"]
    assert older.logprobs.token_logprobs == [-0.5]
    assert older.logprobs.top_logprobs == [{"Yes": -0.5, "No": -1.0}]
    assert older.logprobs.text_offset == [0]


def test_streamed_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=["a", "b"], echo=True, stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "aHello, world", 1: "bHello, world"}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "default"]
    assert client.models.retrieve(MODEL).owned_by == "fourfold"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"
    assert f"'{MODEL}'" in str(error.value)


def test_errors_arrive_as_the_clients_own(client: openai.OpenAI, gateway: FakeGateway) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HI, reasoning_effort="low")
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "reasoning_effort")
    gateway.say(refuse=OverloadedError("full; try again", retry_after=1))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=MODEL, messages=HI)
    gateway.say("a", "b", delay=0.01, fail=RequestFailedError("the engine failed"), fail_after=1)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_what_took_too_long_is_not_sent_again(
    client: openai.OpenAI, gateway: FakeGateway, stream: bool
) -> None:
    gateway.say("a", fail=DeadlineError("the request did not finish within 600 seconds"))
    with pytest.raises(openai.APIStatusError) as late:
        client.with_options(max_retries=1).chat.completions.create(
            model=MODEL, messages=HI, stream=stream
        )
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    assert len(gateway.calls) == 1

"""One request from admission to its one end, with an engine that is told what to say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.engine.messages import (
    Abort,
    FinishReason,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from fourfold.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    RequestFailedError,
)
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway import made_tokenizers
from tests.cpu.gateway.made_tokenizers import EOS
from tests.cpu.gateway.scripted import data, finishes, hear, make_gateway, text

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
LOGPROBS = SamplingParams(logprobs=1)


def asking(**fields: Any) -> GenerationOptions:
    return GenerationOptions(**fields)


def test_a_conversation_becomes_tokens_and_the_answer_text(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        conversation = [{"role": "user", "content": "hi"}]
        generation = await gateway.chat(conversation, asking(max_tokens=9))
        [request] = engine.submitted
        assert tokenizer.decode(list(request.prompt_ids)) == "user: hi\nassistant: "
        assert generation.prompt_text == "user: hi\nassistant: "
        assert request.sampling.max_tokens == 9
        assert EOS in request.sampling.stop_token_ids
        assert request.sampling.seed is not None, "one request is one seed, also when preempted"
        await engine.say(generation, "well, ", "hello 漢字", EOS, finish=STOP)
        deltas = await hear(generation)
        assert text(deltas) == "well, hello 漢字"
        assert finishes(deltas) == [STOP]
        assert generation.usage.prompt_tokens == len(request.prompt_ids)
        assert generation.usage.completion_tokens == len(engine.encode("well, hello 漢字")) + 1
        assert gateway.active == 0
        assert engine.aborted == []

    asyncio.run(main())


def test_what_is_asked_reaches_the_engine(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        stops = (9, 4) * 1000
        sampling = SamplingParams(temperature=0.5, seed=7, stop_token_ids=stops, logprobs=3)
        await gateway.complete("ab", asking(sampling=sampling, n=3, ignore_eos=True))
        [request] = engine.submitted
        assert request.n == 3
        assert request.sampling.stop_token_ids == (9, 4)
        assert (request.sampling.temperature, request.sampling.seed) == (0.5, 7)
        assert request.sampling.max_tokens == engine.max_context - len(request.prompt_ids)
        tokens = await gateway.complete([5, 6], asking())
        assert engine.submitted[1].prompt_ids == (5, 6)
        assert [token.token for token in tokens.prompt_tokens] == [5, 6]

    asyncio.run(main())


def test_the_tokens_of_a_prompt_are_built_once(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, _ = make_gateway(tokenizer)
        sampling = SamplingParams(logprobs=1, prompt_logprobs=True)
        generation = await gateway.complete([5, 6], asking(sampling=sampling))
        assert [token.logprob for token in generation.prompt_tokens] == [None, None]
        report = (TokenLogprob(token=6, logprob=-1.5, top=((7, -0.5),)),)
        generation.receive(
            TokenOutput(request_id=generation.request_id, index=0, token=8, prompt_logprobs=report)
        )
        tokens = generation.prompt_tokens
        assert [(token.token, token.logprob) for token in tokens] == [(5, None), (6, -1.5)]
        assert generation.prompt_tokens is tokens

    asyncio.run(main())


def test_a_stop_string_across_tokens_ends_the_sample(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(stop=("###", "zz"), n=2))
        await engine.say(generation, "one #", "#")
        await engine.say(generation, "two z", index=1)
        await engine.say(generation, "#", "never")
        abort = Abort(request_id=generation.request_id, index=0, reason=STOP)
        assert engine.aborted == [abort]
        done = TokenOutput(request_id=generation.request_id, index=0, finish=STOP)
        await engine.emit(done)
        assert gateway.active == 1
        await engine.say(generation, "!", "", "#", index=1, finish=LENGTH)
        deltas = await hear(generation)
        assert text(deltas, 0) == "one "
        assert text(deltas, 1) == "two z!#"
        assert (finishes(deltas, 0), finishes(deltas, 1)) == ([STOP], [LENGTH])
        assert generation.usage.completion_tokens == sum(
            len(engine.encode(said)) for said in ("one #", "#", "#", "two z", "!", "#")
        )
        assert gateway.active == 0

    asyncio.run(main())


def test_a_stop_string_that_only_the_last_bytes_complete(tokenizer: Tokenizer) -> None:
    """The token that reaches the length limit also completes a stop string: it is a stop."""

    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(stop=("ab",)))
        await engine.say(generation, "1a", "b", finish=LENGTH)
        deltas = await hear(generation)
        assert (text(deltas), finishes(deltas)) == ("1", [STOP])
        assert engine.aborted == [], "the engine has ended it already"

    asyncio.run(main())


@settings(deadline=None, max_examples=60)
@given(
    said=st.text(alphabet="ab é#", min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab é#", min_size=1, max_size=3), max_size=2),
    ended=st.sampled_from([STOP, LENGTH]),
)
def test_logprobs_are_of_the_text_that_was_sent_and_of_no_more(
    said: str, stop: list[str], ended: FinishReason, tokenizer: Tokenizer
) -> None:
    """Single-byte tokens, so that text and tokens can be compared at every delta."""

    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        options = asking(sampling=LOGPROBS, stop=tuple(stop), ignore_eos=True)
        generation = await gateway.complete("x", options)
        token_of = {tokenizer.token_bytes(token): token for token in range(3, 259)}
        tokens = [token_of[bytes([byte])] for byte in said.encode()]
        await engine.say(generation, *tokens, finish=ended)
        deltas = await hear(generation)
        whole = said
        for end in range(1, len(said) + 1):
            starts = [end - len(each) for each in stop if said[:end].endswith(each)]
            if starts:
                whole = said[: min(starts)]
                break
        assert text(deltas) == whole
        assert data(deltas) == whole.encode()
        for place in range(len(deltas)):
            sent = deltas[: place + 1]
            assert data(sent) == text(sent).encode()

    asyncio.run(main())


def test_a_token_reports_its_exact_bytes_and_the_likeliest_others(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(sampling=LOGPROBS))
        await engine.say(generation, "é", finish=LENGTH)
        deltas = await hear(generation)
        tokens = [token for delta in deltas for token in delta.tokens]
        assert [token.data for token in tokens] == [b"\xc3", b"\xa9"]
        assert [token.text for token in tokens] == ["\ufffd", "\ufffd"]
        assert [token.logprob for token in tokens] == [-0.5, -0.5]
        assert [other.token for other in tokens[0].top] == [tokens[0].token, 5]

    asyncio.run(main())


def test_tokens_without_text_come_with_the_text_after_them(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(sampling=LOGPROBS, ignore_eos=True))
        await engine.say(generation, made_tokenizers.PAD, "a", EOS, "b", finish=LENGTH)
        deltas = await hear(generation)
        assert text(deltas) == "ab"
        assert data(deltas) == b"<|pad|>a<|eos|>b"

    asyncio.run(main())


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking())
        await engine.say(generation, "a", *engine.encode("漢")[:2], finish=LENGTH)
        assert text(await hear(generation)) == "a\ufffd"

    asyncio.run(main())


def test_a_continued_text_keeps_the_space_before_its_first_word(tmp_path: Path) -> None:
    """SentencePiece drops the first space of a text, but an answer begins in the middle of one."""
    backend = made_tokenizers.byte_fallback()
    words = made_tokenizers.load(made_tokenizers.write(tmp_path, backend))

    async def main() -> None:
        gateway, engine = make_gateway(words)
        generation = await gateway.complete("hello", asking())
        await engine.say(generation, backend.token_to_id("\u2581world"), finish=LENGTH)
        assert text(await hear(generation)) == " world"

    asyncio.run(main())


def test_cancelling_frees_and_ends_once(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(n=2))
        await engine.say(generation, "a")
        generation.cancel()
        generation.cancel()
        assert engine.aborted == [Abort(request_id=generation.request_id)]
        assert gateway.active == 0
        await engine.say(generation, "too late", finish=STOP)
        with pytest.raises(RequestFailedError):
            await hear(generation)

    asyncio.run(main())


def test_cancelling_after_the_end_does_nothing(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking())
        await engine.say(generation, "a", finish=LENGTH)
        deltas = await hear(generation)
        generation.cancel()
        assert (text(deltas), engine.aborted) == ("a", [])

    asyncio.run(main())


def test_a_request_that_outlives_its_time_is_ended(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer, GatewayLimits(request_timeout=1))
        generation = await gateway.complete("x", asking())
        quick = await gateway.complete("y", asking())
        await engine.say(quick, "a", finish=LENGTH)
        with pytest.raises(DeadlineError, match="1 seconds"):
            await asyncio.wait_for(hear(generation), 5)
        assert engine.aborted == [Abort(request_id=generation.request_id)]
        assert gateway.active == 0
        assert text(await hear(quick)) == "a"

    asyncio.run(main())


def test_a_failure_ends_all_samples(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", asking(n=2))
        failed = FinishReason.FAILED
        output = TokenOutput(request_id=generation.request_id, index=1, finish=failed, error="boom")
        await engine.emit(output)
        with pytest.raises(RequestFailedError, match="boom"):
            await hear(generation)
        assert engine.aborted == [Abort(request_id=generation.request_id)]
        assert gateway.active == 0

    asyncio.run(main())


def test_one_request_too_many_is_told_to_come_again(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer, GatewayLimits(max_concurrent=2))
        first = await gateway.complete("x", asking())
        await gateway.complete("y", asking())
        with pytest.raises(OverloadedError) as caught:
            await gateway.complete("z", asking())
        assert caught.value.retry_after > 0
        first.cancel()
        await gateway.complete("z", asking())
        assert len(engine.submitted) == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([made_tokenizers.VOCABULARY], "prompt"),
        ([-1], "prompt"),
        ([2**70], "prompt"),
        ("x" * 5000, "prompt"),  # long enough to be encoded on a thread
        ("a lone surrogate \ud800", "prompt"),
    ],
)
def test_refused_prompts_hold_nothing(tokenizer: Tokenizer, prompt: Any, param: str) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        with pytest.raises(RequestError) as caught:
            await gateway.complete(prompt, asking())
        assert caught.value.param == param
        assert gateway.active == 0
        assert engine.submitted == []

    asyncio.run(main())


def test_a_conversation_too_long_is_refused_naming_its_field(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, _ = make_gateway(tokenizer)
        with pytest.raises(RequestError, match="tokens") as caught:
            await gateway.chat([{"role": "user", "content": "x" * 5000}], asking())
        assert caught.value.param == "messages"
        assert caught.value.code == "context_length_exceeded"
        assert gateway.active == 0

    asyncio.run(main())


def test_a_conversation_that_is_no_text_is_refused_naming_its_field(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, _ = make_gateway(tokenizer)
        with pytest.raises(RequestError, match="surrogate") as caught:
            await gateway.chat([{"role": "user", "content": "half \udc00 of one"}], asking())
        assert caught.value.param == "messages"

    asyncio.run(main())


def test_a_model_without_template_cannot_chat(tmp_path: Path) -> None:
    plain = made_tokenizers.load(made_tokenizers.write(tmp_path, made_tokenizers.byte_level()))

    async def main() -> None:
        gateway, _ = make_gateway(plain)
        with pytest.raises(RequestError, match="chat template"):
            await gateway.chat([{"role": "user", "content": "hi"}], asking())

    asyncio.run(main())


def test_an_answer_that_cannot_be_put_together_fails_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have news in one message of the engine; what comes of one must not cost the other's."""

    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        broken, other = [await gateway.complete("x", asking()) for _ in range(2)]

        def fail(output: TokenOutput) -> None:
            raise ValueError("no such token")

        monkeypatch.setattr(broken, "receive", fail)
        [token] = engine.encode("a")
        gateway._deliver(
            [
                TokenOutput(request_id=g.request_id, index=0, token=token, finish=STOP)
                for g in (broken, other)
            ],
            0.0,
        )
        assert text(await hear(other)) == "a"
        with pytest.raises(RequestFailedError, match="ValueError: no such token"):
            await hear(broken)
        assert [message.request_id for message in engine.aborted] == [broken.request_id]
        assert gateway.active == 0

    asyncio.run(main())

"""`from fourfold import LLM`: a model in a program, asked from threads and event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fourfold import LLM
from fourfold import llm as llm_module
from fourfold.engine.messages import FinishReason, SamplingParams
from fourfold.engine.scheduler import Scheduler
from fourfold.errors import ConfigError, DrainingError, RequestError, RequestFailedError
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.tokenizer import Tokenizer
from fourfold.llm import Asked, Result
from tests.cpu import driving
from tests.cpu.gateway import made_tokenizers
from tests.cpu.gateway.made_tokenizers import write_default
from tests.cpu.instead import Instead

GREEDY: Asked = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_default(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return made_tokenizers.load(folder)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path], folder: Path) -> Iterator[LLM]:
    with LLM(
        checkpoint("mixtral"),
        tokenizer=folder,
        device="cpu",
        precision="float32",
        kv_memory_gib=0.02,
        max_running=8,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path], words: Tokenizer) -> Callable[[str], list[int]]:
    """The likeliest tokens after a text, from an engine on its own."""
    engine = driving.make_engine(driving.load_tiny(checkpoint("mixtral")))

    def answer(prompt: str) -> list[int]:
        ids = words.encode(prompt, add_special_tokens=True)
        params = SamplingParams(temperature=0.0, max_tokens=12)
        return driving.generate(engine, [ids], params)[0]

    return answer


def held(llm: LLM) -> int:
    return llm._gateway.active


def quiet(llm: LLM) -> bool:
    """Whether nothing is held, now or soon."""
    deadline = time.monotonic() + 10
    while held(llm) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not held(llm)


def test_results_are_the_engines_in_the_order_of_the_prompts(
    llm: LLM, expected: Callable[[str], list[int]], words: Tokenizer
) -> None:
    prompts = [f"the rain in spain {number}" * (1 + number % 3) for number in range(20)]
    results = llm.generate(prompts, **GREEDY)
    for prompt, result in zip(prompts, results, strict=True):
        [sample] = result.samples
        assert list(sample.token_ids) == expected(prompt)
        assert sample.text == result.text == words.decode(expected(prompt))
        assert sample.finish_reason is FinishReason.LENGTH
        assert result.usage.completion_tokens == 12


def test_one_prompt_may_stand_alone_as_text_or_tokens(llm: LLM, words: Tokenizer) -> None:
    ids = words.encode("spain", add_special_tokens=True)
    [text] = llm.generate("spain", **GREEDY)
    for given in (ids, [ids], tuple(ids), np.array(ids)):
        [result] = llm.generate(given, **GREEDY)  # type: ignore[arg-type]
        assert result.text == text.text
    assert llm.generate([], **GREEDY) == []


def test_a_conversation_is_rendered(llm: LLM) -> None:
    [one] = llm.chat(TALK, **GREEDY)
    several = llm.chat([TALK, [*TALK, {"role": "assistant", "content": "x"}, *TALK]], **GREEDY)
    assert several[0].text == one.text
    assert several[1].usage.prompt_tokens > one.usage.prompt_tokens
    [plain] = llm.generate("hello", **GREEDY)
    assert plain.usage.prompt_tokens < one.usage.prompt_tokens


def test_what_is_asked_is_done(llm: LLM) -> None:
    [result] = llm.generate("spain", **{**GREEDY, "n": 3, "logprobs": 2, "prompt_logprobs": True})
    assert len(result.samples) == 3
    assert len({sample.text for sample in result.samples}) == 1
    for sample in result.samples:
        assert [token.token for token in sample.tokens] == list(sample.token_ids)
        assert all(len(token.top) == 2 for token in sample.tokens)
    assert [token.logprob is None for token in result.prompt_tokens][:2] == [True, False]

    stop = result.text[3:5]
    [stopped] = llm.generate("spain", **GREEDY, stop=stop)
    assert stopped.text == result.text[: result.text.find(stop)]
    assert stopped.samples[0].finish_reason is FinishReason.STOP
    assert len(stopped.samples[0].token_ids) < 12

    drawn = [llm.generate("spain", temperature=1.5, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_stream_says_the_same_in_pieces(llm: LLM) -> None:
    [whole] = llm.generate("the rain", **GREEDY)
    pieces = list(llm.stream("the rain", **GREEDY))
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    [reply] = llm.chat(TALK, **GREEDY)
    assert "".join(llm.stream(TALK, **GREEDY)) == reply.text


def test_a_stream_has_no_place_for_log_probabilities(llm: LLM) -> None:
    with pytest.raises(RequestError, match="leave logprobs out"):
        next(llm.stream("the rain", logprobs=2))


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    for piece in llm.stream("the rain", temperature=0.0, ignore_eos=True):
        assert piece
        break
    assert quiet(llm)


def test_many_at_once_on_an_event_loop(llm: LLM) -> None:
    async def stream(prompt: str) -> str:
        return "".join([piece async for piece in llm.astream(prompt, **GREEDY)])

    async def main() -> tuple[list[list[Result]], list[str], list[Result]]:
        whole = asyncio.gather(*(llm.agenerate(f"rain {i}", **GREEDY) for i in range(20)))
        streams = asyncio.gather(*(stream(f"rain {i}") for i in range(20)))
        return await whole, await streams, await llm.achat([TALK], **GREEDY)

    whole, streams, [reply] = asyncio.run(main())
    assert [result.text for [result] in whole] == streams
    assert [reply] == llm.chat(TALK, **GREEDY)


def test_who_no_longer_waits_is_no_longer_served(llm: LLM) -> None:
    async def main() -> None:
        asked = asyncio.create_task(llm.agenerate("rain", temperature=0.0, ignore_eos=True))
        stream = llm.astream("rain", temperature=0.0, ignore_eos=True)
        first = asyncio.create_task(anext(stream))
        while held(llm) < 2:  # not longer: on a busy machine they might be over
            assert not asked.done()
            await asyncio.sleep(0)
        asked.cancel()
        await first
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await asyncio.to_thread(quiet, llm)

    asyncio.run(main())


def test_threads_share_a_model(llm: LLM) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = llm.generate(f"rain {number % 4}", **GREEDY)[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers.values())) == 4
    assert all(answers[number] == answers[number % 4] for number in range(12))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must be between"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 5000}, "max_tokens 5000"),
        ({"temprature": 1.0}, "temprature is nothing"),
        ({"n": 0}, "n 0"),
        ({"stop": [""]}, "empty stop"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(asked: Asked, says: str, llm: LLM) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate(["fine", "also fine"], **asked)
    with pytest.raises(RequestError, match=says):
        next(llm.stream("fine", **asked))
    assert quiet(llm), "the others are ended"


def test_one_refused_prompt_ends_the_others(llm: LLM) -> None:
    with pytest.raises(RequestError, match="5000 tokens"):
        llm.generate([[5] * 10, [5] * 5000], temperature=0.0, ignore_eos=True)
    assert quiet(llm)


def test_every_option_of_a_request_can_be_asked() -> None:
    names = {
        field.name
        for kind in (GenerationOptions, SamplingParams)
        for field in msgspec.structs.fields(kind)
    }
    assert set(Asked.__annotations__) == names - {"sampling"}


def test_choices_that_do_not_exist(checkpoint: Callable[[str], Path], folder: Path) -> None:
    for wrong in ({"precision": "int3"}, {"kv_pages": "int3"}, {"device": "no such device"}):
        with pytest.raises(ConfigError):
            LLM(checkpoint("mixtral"), tokenizer=folder, **wrong)


def test_a_closed_model_is_gone_and_says_so(
    checkpoint: Callable[[str], Path], folder: Path
) -> None:
    before = threading.active_count()
    with LLM(checkpoint("mixtral"), tokenizer=folder, kv_memory_gib=0.02) as llm:
        stream = llm.stream("rain", temperature=0.0, ignore_eos=True)
        next(stream)
    llm.close()
    with pytest.raises(DrainingError):
        list(stream)
    with pytest.raises(DrainingError, match="closed"):
        llm.generate("rain")
    assert threading.active_count() <= before


def test_closing_tells_everybody_who_waits(
    checkpoint: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too whose prompts are not even tokenised yet."""
    encoding, closing = threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str, **options: Any) -> list[int]:
        encoding.set()
        closing.wait(10)
        time.sleep(0.3)  # the engine ends before
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    heard: list[BaseException] = []

    def ask(asking: Callable[[str], object]) -> None:
        try:
            asking("rain " * 2000)
        except BaseException as error:
            heard.append(error)

    with LLM(checkpoint("mixtral"), tokenizer=folder, kv_memory_gib=0.02) as llm:
        ways = (llm.generate, lambda prompt: list(llm.stream(prompt)))
        threads = [threading.Thread(target=ask, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        assert encoding.wait(10)
        closing.set()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in heard] == [DrainingError] * 2


def test_asking_while_it_is_closed_is_answered(
    checkpoint: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(checkpoint("mixtral"), tokenizer=folder, kv_memory_gib=0.02)
    closing = threading.Thread(target=llm.close)
    submit = asyncio.run_coroutine_threadsafe

    def submit_late(*given: Any) -> Any:
        closing.start()
        closing.join(1)
        return submit(*given)

    late = Instead(asyncio, run_coroutine_threadsafe=submit_late)
    monkeypatch.setattr(llm_module, "asyncio", late)
    with pytest.raises(DrainingError):
        llm.generate("rain", temperature=0.0, ignore_eos=True)
    closing.join(10)
    assert not closing.is_alive()


def test_wrong_options_are_known_before_the_model_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="max-running"):
        LLM("/no/such/model", max_running=0)
    with pytest.raises(ConfigError, match="precision"):
        LLM("/no/such/model", precision="int3")
    with pytest.raises(ConfigError, match=r"precison .*; did you mean 'precision'\?"):
        LLM("/no/such/model", precison="w8a8")
    with pytest.raises(ConfigError, match=r"max_runing .*; did you mean 'max_running'\?"):
        LLM("/no/such/model", max_runing=1)


def test_an_engine_that_ends_by_itself_leaves_nobody_waiting(
    checkpoint: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(Scheduler, "commit", fail)
    with LLM(checkpoint("mixtral"), tokenizer=folder, kv_memory_gib=0.02) as llm:
        with pytest.raises(RequestFailedError, match="a mistake of ours"):
            llm.generate(["rain", "snow"])
        with pytest.raises(DrainingError):
            llm.generate("rain")


def test_a_program_may_end_without_closing(checkpoint: Callable[[str], Path], folder: Path) -> None:
    code = f"""
from fourfold import LLM
llm = LLM({str(checkpoint("mixtral"))!r}, tokenizer={str(folder)!r}, kv_memory_gib=0.02)
stream = llm.stream("rain", temperature=0.0)
print(next(stream) != "")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_importing_the_package_loads_nothing() -> None:
    code = """
import sys, fourfold
assert not {name for name in sys.modules if name.startswith("fourfold.")}
from fourfold import LLM
assert not {"torch", "transformers", "gguf", "fastapi"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "prompts",
    [None, 5, b"x", {"prompt": "x"}, {"a"}, [None], [1.5], ["a", None], [["a"]], [[1], "a", 2]],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is a text or a list of token ids"):
        llm.generate(prompts, **GREEDY)


@pytest.mark.parametrize("prompt", [None, 5, b"x", ["a", "b"], {"role": "user", "content": "x"}])
def test_what_is_no_prompt_is_not_streamed(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is a text or a list of token ids"):
        list(llm.stream(prompt, **GREEDY))


@pytest.mark.parametrize(
    "messages", [None, "hello", ["hello"], TALK[0], [[]], [TALK, "hello"], [1]]
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="a conversation is a list of messages"):
        llm.chat(messages, **GREEDY)

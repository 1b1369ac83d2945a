"""`fourfold serve` as a program: ready, answering an OpenAI client, and ending as it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from fourfold.cli import serve
from fourfold.cli.options import ModelOptions

TALK: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
MAIN = (sys.executable, "-c", "from fourfold.cli.main import main; main()")


class Server:
    """A running `fourfold serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        self.url = ""
        announced = threading.Event()

        def listen() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                self.said.append(line)
                if match := re.search(r" at (http://\S+)/v1 \(ready after", line):
                    self.url = match[1]
                    announced.set()
            announced.set()

        threading.Thread(target=listen, daemon=True).start()
        assert announced.wait(90), "the server did not start in time"
        assert self.url, "".join(self.said[-20:])

    def engine(self) -> int:
        """The engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        [pid] = map(int, children.read_text().split())
        return pid

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [*MAIN, "serve", *arguments, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(served: str) -> Iterator[Server]:
    arguments = ("--precision", "float32", "--kv-memory-gib", "0.02", "--max-concurrent", "8")
    names = ("--served-name", "tiny", "--served-name", "a b", "--served-name", "tiny")
    with serving(*names, str(served), *arguments) as running:
        yield running


def test_it_is_ready_and_names_its_model(server: Server) -> None:
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    names = [model.id for model in server.client().models.list()]
    assert names == ["tiny-mixtral", "tiny", "a b"]
    assert server.client().models.retrieve("a b").id == "a b"


def test_further_names_are_further() -> None:
    assert serve.further_names(serve.Options(served_name=("mine",))) == ("mine", "default")
    named = serve.Options(served_name=("mine",), model=ModelOptions(model="owner/name"))
    assert serve.further_names(named) == ("mine",)


def test_an_openai_client_gets_the_same_answer_streamed_and_not(server: Server) -> None:
    client = server.client()
    asked = {"model": "tiny", "messages": TALK, "temperature": 0.0, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 5, "it is streamed"
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30


def test_a_mistake_is_a_clear_error(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client().chat.completions.create(model="tiny", messages=TALK, temperature=-1)


def test_more_prompts_than_it_may_ever_hold_are_refused_for_good(server: Server) -> None:
    """A client would try again for ever what is answered 429."""
    completions = server.client().completions
    assert len(completions.create(model="tiny", prompt=["a"] * 8, max_tokens=1).choices) == 8
    with pytest.raises(openai.BadRequestError, match="at most 8 entries"):
        completions.create(model="tiny", prompt=["a"] * 9, max_tokens=1)


def ends_once_its_streams_have(server: Server, number: signal.Signals) -> None:
    """It is asked to end by a signal while an answer is on its way: no other is begun."""
    stream = server.client().chat.completions.create(
        model="tiny-mixtral", messages=TALK, temperature=0, max_tokens=300, stream=True
    )
    chunks = iter(stream)
    first = [next(chunks) for _ in range(5)]
    server.process.send_signal(number)
    time.sleep(0.1)
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        server.client().chat.completions.create(model="tiny-mixtral", messages=TALK)
    rest = list(chunks)
    assert [c.choices[0].finish_reason for c in [*first, *rest] if c.choices][-1] == "length"
    assert server.process.wait(30) == 0
    assert "Traceback" not in "".join(server.said)


def test_a_signal_lets_a_running_stream_finish(small: Sequence[str]) -> None:
    with serving(*small) as server:
        ends_once_its_streams_have(server, signal.SIGINT)


def test_an_engine_that_dies_is_started_again(small: Sequence[str]) -> None:
    """And the stream goes on as if nothing had been. The server ends as any other."""
    asked = {"model": "tiny-mixtral", "messages": TALK, "temperature": 0, "max_tokens": 300}
    with serving(*small) as server:
        whole = server.client().chat.completions.create(**asked)  # type: ignore[call-overload]
        stream = server.client().chat.completions.create(  # type: ignore[call-overload]
            **asked, stream=True
        )
        chunks = iter(stream)
        pieces = [next(chunks) for _ in range(5)]
        os.kill(server.engine(), signal.SIGKILL)
        pieces += chunks
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        assert text == whole.choices[0].message.content
        assert any("was ended by SIGKILL" in line for line in server.said)
        ends_once_its_streams_have(server, signal.SIGTERM)


def test_an_option_that_only_the_engine_can_judge(small: Sequence[str]) -> None:
    arguments = [*MAIN, "serve", *small, "--port", "0", "--device", "cuda:77"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("fourfold: device 'cuda:77' does not exist")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("when", ["loading", "serving"])
def test_no_engine_outlives_its_server(
    when: str, small: Sequence[str], request: pytest.FixtureRequest
) -> None:
    """However the server ends: an orphan would keep the GPU. Last, for it ends the shared one."""
    if when == "serving":
        server: Server = request.getfixturevalue("server")
        engine = server.engine()
        server.process.kill()
    else:
        process = subprocess.Popen([*MAIN, "serve", *small, "--port", "0"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (children.exists() and children.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        engine = int(children.read_text())
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while running(engine):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process computes still; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

"""`fourfold chat` with its lines scripted; test_chat_terminal does it at a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fourfold.engine.messages import SamplingParams
from fourfold.gateway.chat_template import ChatTemplate
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu import driving
from tests.cpu.cli.conftest import Command

LIKELIEST = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "8")
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(command: Command, small: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Types lines, then leaves."""

    def go(lines: Sequence[str], *options: str) -> tuple[int, str, str]:
        left = iter(lines)

        def typed(prompt: str = "") -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", typed)
        return command("chat", *small, *options)

    return go


@pytest.fixture
def reply(served: Path, words: Tokenizer) -> Callable[..., str]:
    """The likeliest reply to a conversation of alternating messages, computed by itself."""
    engine = driving.make_engine(driving.load_tiny(served))
    assert words.chat_template is not None
    template = ChatTemplate(words.chat_template, words.specials)

    def answer(*said: str, system: str | None = None) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = words.encode(template.render(messages), add_special_tokens=False)
        params = SamplingParams(temperature=0.0, max_tokens=8)
        return words.decode(driving.generate(engine, [ids], params)[0])

    return answer


def test_lines_that_are_no_text_are_a_clear_error(
    command: Command, small: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    code, _, err = command("chat", *small, *LIKELIEST)
    assert code == 2
    assert err.splitlines()[-1].startswith("fourfold: the input cannot be read: 'utf-8' codec")


def test_a_reply_knows_what_was_said_before(talk: Talk, reply: Callable[..., str]) -> None:
    code, out, _ = talk(["hello", "and then?"], *LIKELIEST)
    first = reply("hello")
    second = reply("hello", first, "and then?")
    assert code == 0
    assert out == f"{first}\n{second}\n"
    assert first != second


def test_reset_forgets_all_but_the_system_message(talk: Talk, reply: Callable[..., str]) -> None:
    lines = ["hello", "/reset", "hello"]
    code, out, err = talk(lines, *LIKELIEST, "--system", "Be kind.")
    once = reply("hello", system="Be kind.")
    assert code == 0
    assert out == f"{once}\n{once}\n"
    assert once != reply("hello")
    assert "forgotten" in err


def test_what_is_typed_besides(talk: Talk, reply: Callable[..., str]) -> None:
    code, out, err = talk(["", "   ", "/help", "hello", "/exit", "never"], *LIKELIEST)
    assert code == 0
    assert out == reply("hello") + "\n"
    assert err.count("/reset") == 2


@pytest.mark.parametrize("line", ["/rest", "/", "/exit now"])
def test_a_command_that_is_not_known_is_not_sent(
    line: str, talk: Talk, reply: Callable[..., str]
) -> None:
    code, out, err = talk([line, "hello"], *LIKELIEST)
    assert code == 0
    assert out == reply("hello") + "\n"
    assert f"fourfold: {line} is no command" in err
    assert err.count("/reset") == 2


def test_a_path_is_no_command(talk: Talk, reply: Callable[..., str]) -> None:
    assert talk(["/etc/hosts is what?"], *LIKELIEST)[1] == reply("/etc/hosts is what?") + "\n"


def test_a_line_too_long_is_refused_and_forgotten(talk: Talk, reply: Callable[..., str]) -> None:
    code, out, err = talk(["x" * 3000, "hello"], *LIKELIEST)
    assert code == 0
    assert out == reply("hello") + "\n"
    assert "fourfold: the prompt has" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("line", ["\udcff", "a\x00b"])
def test_bytes_that_are_no_text_do_not_end_the_talk(
    line: str, talk: Talk, reply: Callable[..., str]
) -> None:
    """A terminal passes them on as lone surrogates."""
    code, out, err = talk([line, "/reset", "hello"], *LIKELIEST)
    assert code == 0
    assert out.endswith(reply("hello") + "\n")
    assert "Traceback" not in err


def test_an_option_out_of_range_is_said_at_once_or_for_each_line(talk: Talk) -> None:
    code, out, err = talk(["hello"], "--temperature", "-1")
    assert out == ""
    assert "temperature -1" in err
    assert code in (0, 2)

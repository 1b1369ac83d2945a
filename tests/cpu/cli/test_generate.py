"""`fourfold generate`: every line answered, in order, and only once."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fourfold.engine.messages import SamplingParams
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu import driving
from tests.cpu.cli.conftest import Command


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Lines whose answers end in another order than they begin."""
    lines = [
        {"id": f"line {i}", "prompt": "the rain " * (1 + i % 3), "max_tokens": 1 + (7 * i) % 20}
        for i in range(24)
    ]
    return write(tmp_path / "in.jsonl", lines)


def test_answers_are_the_engines_in_the_order_of_the_input(
    many: Path, served: Path, words: Tokenizer, command: Command, small: Sequence[str]
) -> None:
    output = many.parent / "out.jsonl"
    code, out, err = command("generate", many, output, *small)
    assert (code, out) == (0, ""), err
    engine = driving.make_engine(driving.load_tiny(served))
    for asked, got in zip(read(many), read(output), strict=True):
        ids = words.encode(asked["prompt"], add_special_tokens=True)
        params = SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"])
        [answer] = driving.generate(engine, [ids], params)
        assert got == {
            "id": asked["id"],
            "text": words.decode(answer),
            "finish_reason": "length",
            "prompt_tokens": len(ids),
            "completion_tokens": asked["max_tokens"],
            "request_hash": got["request_hash"],
        }


@pytest.mark.parametrize("tail", [b"", b'{"id": "line 7", "text": "cut of', b'{"id": "\xe6\xbc'])
def test_a_second_run_continues_where_the_first_was_cut(
    tail: bytes, many: Path, command: Command, small: Sequence[str]
) -> None:
    output = many.parent / "out.jsonl"
    marked = (b'"line 3", ', b'"line 3", "not again": true, ')
    assert command("generate", many, output, *small)[0] == 0
    whole = output.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:7]).replace(*marked)
    output.write_bytes(kept + tail)
    code, _, err = command("generate", many, output, *small)
    assert code == 0, err
    assert output.read_bytes() == whole.replace(*marked)


@pytest.mark.parametrize("held", ['{"id": 7, "text": "z"}', "[1]", "no JSON"])
def test_answers_to_other_lines_are_not_continued(
    held: str, tmp_path: Path, command: Command
) -> None:
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "x", "id": 1}, {"prompt": "y", "id": 2}])
    output = tmp_path / "out.jsonl"
    output.write_text(f"{held}\n")
    code, _, err = command("generate", prompts, output, "/no/such/model")
    assert code == 2
    assert "line 1 does not answer id 1" in err
    assert output.read_text() == f"{held}\n"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ("a note\n", "line 1 is no answer"),
        ('{"prompt": "z"}\n', "line 1 is no answer"),
        ("a note without an end", "ends with what is no answer"),
        ('{"text": "y"}\na note', "ends with what is no answer"),
        ('{"id": 1, "prompt": "z"}', "ends with what is no answer"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(
    held: str, says: str, tmp_path: Path, command: Command
) -> None:
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    output = tmp_path / "out.jsonl"
    output.write_text(held)
    code, _, err = command("generate", prompts, output, "/no/such/model")
    assert code == 2
    assert says in err
    assert output.read_text() == held


def test_the_input_is_never_its_own_output(tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "y"}')
    link = tmp_path / "out.jsonl"
    link.symlink_to(prompts)
    for output in (prompts, link):
        code, _, err = command("generate", prompts, output, "/no/such/model")
        assert code == 2
        assert "is the input itself" in err
    assert prompts.read_text() == '{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "y"}'


def test_answers_to_other_prompts_or_under_other_options_are_not_continued(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    """They need no id for that; a model may have moved."""
    lines = [{"prompt": "rain", "max_tokens": 2}, {"prompt": "x" * 3000}, {"prompt": "c"}]
    prompts, output = write(tmp_path / "in.jsonl", lines[:2]), tmp_path / "out.jsonl"
    model, *options = small
    assert command("generate", prompts, output, *small)[0] == 1  # the second line is too long
    held = output.read_bytes()
    moved = (f"/elsewhere/{Path(model).name}", *options)
    assert "already holds all 2" in command("generate", prompts, output, *moved)[2]

    others: list[tuple[str, ...]] = [("--seed", "1"), ("--temperature", "0.5"), ("--stop", "a")]
    for more in [*others, ("--max-tokens", "9"), ("--top-p", "0.5"), ("--kv-pages", "int8")]:
        code, _, err = command("generate", prompts, output, *moved, *more)
        assert code == 2
        assert "line 1 answers another prompt, or under other options; name another output" in err
    for model in ("/no/such/model", "default"):
        assert command("generate", prompts, output, model, *options)[0] == 2
    for more in ({"prompt": "snow"}, {"max_tokens": 3}, {"seed": 7}):
        write(prompts, [lines[0] | more, lines[1]])
        assert command("generate", prompts, output, *moved)[0] == 2
    write(prompts, [lines[0], {"prompt": "short"}])
    assert "line 2 answers another" in command("generate", prompts, output, *moved)[2]
    assert output.read_bytes() == held

    write(prompts, lines)
    assert command("generate", prompts, output, *small)[0] == 0
    assert output.read_bytes().startswith(held)
    assert len(read(output)) == 3


def test_nothing_is_loaded_when_nothing_is_left_to_do(tmp_path: Path, command: Command) -> None:
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    output = write(tmp_path / "out.jsonl", [{"text": "y"}])
    code, out, err = command("generate", prompts, output, "/no/such/model")
    assert (code, out) == (0, "")
    assert "already holds all 1 answers" in err
    assert read(output) == [{"text": "y"}]


def test_from_standard_input_to_standard_output(
    command: Command, small: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a", "id": 1}\n{"prompt": "b"}\n'))
    code, out, _ = command("generate", "-", "-", *small, "--max-tokens", "3")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer.get("id") for answer in answers] == [1, None]
    assert [answer["completion_tokens"] for answer in answers] == [3, 3]


def test_a_line_knows_better_than_the_command(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [
        {"prompt": "spain"},
        {"prompt": "spain", "max_tokens": 4},
        {"prompt": "spain", "temperature": 1.5, "seed": 5},
        {"prompt": "spain", "temperature": 1.5, "seed": 5},
        {"prompt": "spain", "temperature": 1.5, "seed": 6},
        {"prompt": "spain", "temperature": 1.5, "seed": 5, "top_p": 0.0},
        talk,
        {"prompt": "user: hi\nassistant: "},
    ]
    output = tmp_path / "out.jsonl"
    prompts = write(tmp_path / "in.jsonl", lines)
    assert command("generate", prompts, output, *small, "--max-tokens", "12")[0] == 0
    plain, short, drawn, again, other, likeliest, chat, written = read(output)
    assert (plain["completion_tokens"], short["completion_tokens"]) == (12, 4)
    assert drawn == again
    assert drawn["text"] not in (plain["text"], other["text"])
    assert likeliest["text"] == plain["text"]
    assert chat == written | {"request_hash": chat["request_hash"]}

    stop = plain["text"][3:5]
    lines = [{"prompt": "spain"}, {"prompt": "spain", "stop": []}]
    again_output = tmp_path / "stopped.jsonl"
    prompts = write(tmp_path / "stop.jsonl", lines)
    arguments = ("--max-tokens", "12", "--stop", stop)
    assert command("generate", prompts, again_output, *small, *arguments)[0] == 0
    stopped, unstopped = read(again_output)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == plain["text"][: plain["text"].find(stop)]
    assert unstopped["text"] == plain["text"]


def test_a_line_that_cannot_be_answered_does_not_stop_the_others(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    lines = [
        {"id": 1, "prompt": "a", "max_tokens": 2},
        {"id": 2, "prompt": "x" * 3000},
        {"id": 3, "prompt": "a", "temperature": -1},
        {"id": 4, "prompt": ""},
        {"id": 5, "messages": []},
        {"id": 6, "prompt": "b", "max_tokens": 2},
    ]
    output = tmp_path / "out.jsonl"
    code, _, err = command("generate", write(tmp_path / "in.jsonl", lines), output, *small)
    assert code == 1
    answers = read(output)
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4, 5, 6]
    failed = [answer["id"] for answer in answers if "error" in answer]
    assert failed in ([2, 3, 4], [2, 3, 4, 5])
    assert "3000 tokens" in answers[1]["error"]
    assert "temperature" in answers[2]["error"]
    assert f"{len(failed)} of 6 lines failed" in err
    assert "Traceback" not in err


def test_characters_that_only_python_takes_for_line_ends(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    """JSON allows U+2028, U+2029 and U+0085 inside strings; a line ends at a newline only."""
    lines = [{"id": "a\u2028b\u0085c\u2029d", "prompt": "x\u2028y\x7f\u0085z"}, {"prompt": "b"}]
    output = tmp_path / "out.jsonl"
    prompts = write(tmp_path / "in.jsonl", lines)
    code, _, err = command("generate", prompts, output, *small, "--max-tokens", "2")
    assert code == 0, err
    assert [answer.get("id") for answer in read(output)] == ["a\u2028b\u0085c\u2029d", None]


def test_more_lines_than_a_server_would_hold(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    """A server refuses what exceeds its places; a file of prompts only waits."""
    prompts = write(tmp_path / "in.jsonl", [{"prompt": f"{i}"} for i in range(450)])
    output = tmp_path / "out.jsonl"
    arguments = ("--max-running", "200", "--max-tokens", "3")
    code, _, err = command("generate", prompts, output, *small, *arguments)
    assert code == 0, err
    assert len(read(output)) == 450


def test_an_empty_file_has_no_answers(
    tmp_path: Path, command: Command, small: Sequence[str]
) -> None:
    prompts = write(tmp_path / "in.jsonl", [])
    code, out, err = command("generate", prompts, "-", *small)
    assert (code, out) == (0, "")
    assert err == f"{prompts} holds no prompts, so there is nothing to answer\n"

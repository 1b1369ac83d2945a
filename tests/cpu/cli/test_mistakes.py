"""What a person types wrong is answered in one line with the remedy, and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cpu.cli.conftest import Command


def assert_one_line(result: tuple[int, str, str], *fragments: str) -> None:
    code, out, err = result
    err = err.lstrip("\n")  # see test_a_progress_bar_leaves_no_trace_in_a_log
    assert err.startswith("fourfold: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert (code, out) == (2, "")
    for fragment in fragments:
        assert fragment in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("serv", ["no command 'serv'", "did you mean 'serve'?"]),
        ("xyz", ["no command 'xyz'", "known are serve, worker, "]),
        ("bench", ["bench", "bench serve"]),
        ("bench nothing", ["bench serve"]),
        ("--port 8000", ["--port"]),
        ("serve --prot 8001", ["--prot", "serve --help"]),
        ("serve --max-runing 8", ["--max-running"]),
        ("serve --port many", ["many"]),
        ("serve --port 99999", ["--port 99999", "65535"]),
        ("serve --port", ["--port"]),
        ("serve --max-running 0", ["--max-running 0"]),
        ("serve --max-running 99999999", ["--max-running 99999999", "65536"]),
        ("serve --step-tokens 99999999", ["--step-tokens 99999999", "4194304"]),
        ("serve --decode-threads 100000", ["--decode-threads 100000", "1024"]),
        ("serve --model gpt", ["--model", "without an option", "serve --help"]),
        ("serve --max-running None", ["--max-running", "INT"]),
        ("cluster role", ["NAME", "ROLE", "cluster role --help"]),
        ("quantize", ["--out PATH", "quantize --help"]),
        ("chat --max-tokens 0", ["--max-tokens", "0 must be at least 1"]),
        ("chat --top-p 2", ["--top-p", "between 0.0 and 1.0"]),
        ("serve --max-running 600 --step-tokens 512", ["--step-tokens 512"]),
        ("serve --step-tokens 64", ["--step-tokens 64"]),
        ("serve --kv-memory-gib -1", ["--kv-memory-gib"]),
        ("serve --max-context 1", ["--max-context"]),
        ("serve --max-n 0", ["--max-n 0"]),
        ("serve --drain-timeout -1", ["--drain-timeout"]),
        ("serve --precision int3", ["int3", "w8a8"]),
        ("serve --load random", ["random", "dummy"]),
        ("serve one two three", ["two"]),
        ("serve /no/such/folder", ["/no/such/folder", "not found"]),
        ("serve no-such-model", ["no-such-model", "owner/name"]),
        ("serve /", ["/ has no config.json", ".gguf", "owner/name"]),
        ("inspect /no/such/file.gguf", ["/no/such/file.gguf"]),
        ("worker --join a..b:70", ["--join a..b:70 is no HOST:PORT", "example 10.0.0.5:7000"]),
        ("serve --served-name= no-such-model", ["--served-name ''", "give one"]),
        ("serve --revision main", ["revision main", "hub id"]),
        ("inspect --tokenizer /no/such/words", ["/no/such/words"]),
        ("serve --served-name mine no-such-model", ["no-such-model", "owner/name"]),
        ("generate --stop END /no/such/file.jsonl", ["/no/such/file.jsonl cannot be read"]),
        ("serve no-such-model --api-key", ["--api-key"]),  # an unset $KEY must not open the door
        ("chat --temperature hot", ["hot"]),
        ("chat --tokenizer", ["--tokenizer"]),
        ("generate", ["generate --help"]),
        ("generate /no/such/file.jsonl", ["/no/such/file.jsonl"]),
        ("generate / out.jsonl", ["/"]),
    ],
)
def test_before_anything_is_loaded(line: str, fragments: Sequence[str], command: Command) -> None:
    assert_one_line(command(*line.split()), *fragments)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 728. TiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes\nframes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    ],
)
def test_too_little_memory(
    error: Exception, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> int:
        raise error

    monkeypatch.setattr("fourfold.cli.law_fit.run", run)
    assert_one_line(command("law", "fit", "x"), "not enough memory", "ask for less")


def test_a_bug_is_not_taken_for_a_mistake(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr("fourfold.cli.law_fit.run", run)
    with pytest.raises(RuntimeError, match="ours"):
        command("law", "fit", "x")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "hello", "max_tokens": 2}\n')
    return path


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("--device tpu", ["tpu", "cuda"]),
        ("--device cuda:99", ["cuda:99"]),
        ("--routing uniform", ["--load dummy"]),
        ("--tokenizer /no/such/tokenizer", ["/no/such/tokenizer"]),
        ("--kv-memory-gib 1e-9", ["--kv-memory-gib"]),
        ("--kv-memory-gib 1e9", ["--kv-memory-gib"]),
        ("--kv-memory-gib nan", ["--kv-memory-gib"]),
        ("--kv-memory-gib inf", ["--kv-memory-gib"]),
    ],
)
def test_about_the_model(
    options: str, fragments: Sequence[str], prompts: Path, served: Path, command: Command
) -> None:
    done = command("generate", prompts, "-", served, "--precision", "float32", *options.split())
    assert_one_line(done, *fragments)


def test_a_progress_bar_leaves_no_trace_in_a_log(
    prompts: Path, command: Command, small: Sequence[str]
) -> None:
    """Where standard error is no terminal, the bar of loading prints not even an empty line."""
    _, _, err = command("generate", prompts, "-", *small, "--kv-memory-gib", "1e-9")
    assert err.startswith("fourfold: ")


def test_a_folder_without_tokenizer(prompts: Path, served: Path, command: Command) -> None:
    bare = prompts.parent / "bare"
    shutil.copytree(served, bare, ignore=shutil.ignore_patterns("*tokenizer*"))
    done = command("generate", prompts, "-", bare, "--precision", "float32")
    assert_one_line(done, "tokenizer.json")


def test_a_tokenizer_from_a_folder_of_its_own(
    prompts: Path, served: Path, command: Command
) -> None:
    """`--tokenizer`: where the tokenizer is, if not with the model; there need be no weights."""
    bare, own = prompts.parent / "bare", prompts.parent / "own"
    shutil.copytree(served, bare, ignore=shutil.ignore_patterns("*tokenizer*"))
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(served / name, own)
    arguments = (bare, "--precision", "float32", "--kv-memory-gib", "0.02", "--tokenizer", own)
    code, out, err = command("generate", prompts, "-", *arguments)
    assert code == 0, err
    assert json.loads(out)["completion_tokens"] == 2


def test_a_model_without_a_chat_template_is_not_talked_to(
    prompts: Path, served: Path, command: Command
) -> None:
    plain = prompts.parent / "plain"
    shutil.copytree(served, plain, ignore=shutil.ignore_patterns("chat_template*", "*.safetensors"))
    path = plain / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    (plain / "model.safetensors").touch()  # what it holds is not looked at
    assert_one_line(command("chat", plain), "no chat template", "fourfold generate")


def test_a_grid_with_a_field_that_is_not_known(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'base = "b"\nout = "o"\ntokens = [1]\nratios = [1]\n[[model]]\nname = "a"\nlayers = 2\n'
    )
    assert_one_line(command("law", "sweep", path), "`layers`", "[[model]] has name, set, ratios")


def test_a_chat_template_that_cannot_be_compiled(
    prompts: Path, served: Path, command: Command
) -> None:
    broken = prompts.parent / "broken"
    shutil.copytree(served, broken)
    (broken / "chat_template.jinja").write_text("{% for %}")
    done = command("generate", prompts, "-", broken, "--precision", "float32")
    assert_one_line(done, "template")


def test_weights_that_are_not_those_of_the_configuration(
    prompts: Path, served: Path, command: Command
) -> None:
    odd = prompts.parent / "odd"
    shutil.copytree(served, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    done = command("generate", prompts, "-", odd, "--precision", "float32")
    assert_one_line(done, "model.layers.3", "missing")


def test_a_taken_port_is_known_before_the_model_is_loaded(served: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", served, "--port", str(port), "--device", "no such device")
        assert_one_line(done, f"port {port}", "--port")


def test_an_address_of_another_machine(served: Path, command: Command) -> None:
    assert_one_line(command("serve", served, "--host", "no.such.host.invalid"), "--host")
    assert_one_line(command("serve", served, "--host", "192.0.2.1", "--port", "0"), "--host")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "JSON"),
        ('{"prompt": "x"', "truncated"),
        ('{"prompt": 3}', "prompt"),
        ('{"promt": "x"}', "`promt`; did you mean 'prompt'?"),
        ('{"prompt": "x", "xyz": 1}', "`xyz`; known are id, prompt, messages, "),
        ("{}", "prompt or messages"),
        ('{"prompt": "x", "messages": []}', "prompt or messages"),
        ('{"messages": "x"}', "messages"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature"),
        ('["x"]', "object"),
    ],
)
def test_a_bad_line_is_named_by_its_number(
    line: str, problem: str, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n{{"prompt": "fine"}}\n')
    assert_one_line(command("generate", path, "/no/such/folder/out"), f"{path}, line 3", problem)


def test_a_file_that_is_no_text(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert_one_line(command("generate", path), str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_files_that_may_not_be_read_or_written(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n')
    path.chmod(0)
    assert_one_line(command("generate", path), str(path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk(prompts: Path, command: Command, small: Sequence[str]) -> None:
    code, _, err = command("generate", prompts, "/dev/full", *small)
    assert code == 2
    assert err.splitlines()[-1].startswith("fourfold: nothing more can be written"), err
    assert "make room" in err


def test_an_output_that_cannot_be_written(
    prompts: Path, command: Command, small: Sequence[str]
) -> None:
    folder = prompts.parent / "folder"
    folder.mkdir()
    assert_one_line(command("generate", prompts, folder, *small), str(folder))
    missing = prompts.parent / "missing" / "out.jsonl"
    assert_one_line(command("generate", prompts, missing, *small), str(missing))


def test_an_output_that_belongs_to_another_input(prompts: Path, command: Command) -> None:
    output = prompts.parent / "out.jsonl"
    output.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert_one_line(command("generate", prompts, output), "2 answers for 1 prompts")
    assert output.read_text() == '{"text": "a"}\n{"text": "b"}\n'

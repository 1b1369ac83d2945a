"""`fourfold quantize`, from the arguments to a folder that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import find_source
from fourfold.models.conversion.text import calibration_text, held_out_text
from tests.cpu.cli.conftest import Command

SMALL = ("--windows", "4", "--held-out-windows", "2", "--window-tokens", "32", "--device", "cpu")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    """Two short texts as arguments."""
    for name in ("calibration", "held-out"):
        (tmp_path / name).write_text(f"a text to read, called {name}\n" * 40)
    text, held_out = tmp_path / "calibration", tmp_path / "held-out"
    return ("--text", str(text), "--held-out", str(held_out))


def test_a_converted_model_is_served(
    served: Path, tmp_path: Path, texts: tuple[str, ...], command: Command
) -> None:
    out = tmp_path / "out"
    code, said, log = command("quantize", served, "--out", out, *SMALL, *texts)
    assert code == 0, log
    assert "perplexity" in said
    assert "bits each" in said
    for layer in range(3):
        assert f"layer {layer}: " in log
    assert "experts.gate_up" in log
    assert load_tokenizer(find_source(str(out))).chat_template
    code, said, log = command("inspect", out, "--device", "cpu")
    assert code == 0, said + log
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a text", "max_tokens": 4}) + "\n")
    small = ("--precision", "float32", "--device", "cpu", "--kv-memory-gib", "0.02")
    code, said, log = command("generate", prompts, "-", out, *small)
    assert code == 0, log
    assert json.loads(said)["completion_tokens"] == 4


def test_rounding_reads_no_text_to_calibrate_on(
    served: Path, tmp_path: Path, texts: tuple[str, ...], command: Command
) -> None:
    (tmp_path / "calibration").unlink()
    out = tmp_path / "out"
    arguments = (served, "--out", out, "--method", "rtn", "--recipe", "int8-channel")
    code, _, log = command("quantize", *arguments, *SMALL, *texts[2:])
    assert code == 0, log
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["recipe"] == "int8-channel"
    assert config["made"]["method"] == "rtn"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "int3"], "recipe"),
        (["--windows", "0"], "--windows"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--held-out", "nowhere.txt"], "nowhere.txt"),
        (["--window-tokens", "100000"], "give a longer text"),
        (["--window-tokens", "1025", "--windows", "1"], "1024 positions"),
        (["--method", "rtn"], "--text"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    named: str,
    served: Path,
    tmp_path: Path,
    texts: tuple[str, ...],
    command: Command,
) -> None:
    given = dict(zip((*SMALL, *texts)[::2], (*SMALL, *texts)[1::2], strict=True))
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    flat = [part for pair in given.items() for part in pair]
    code, _, log = command("quantize", served, "--out", tmp_path / "out", *flat)
    assert code == 2
    assert named in log
    assert log.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_for_all_windows_is_told(
    served: Path, tmp_path: Path, texts: tuple[str, ...], command: Command
) -> None:
    given = ("--windows", "1000", *SMALL[2:], *texts)
    code, _, log = command("quantize", served, "--out", tmp_path / "out", *given)
    assert code == 0, log
    assert "--text is enough for" in log
    assert "of the 1000 windows" in log
    assert "--held-out is" not in log


def test_the_folder_is_needed(served: Path, command: Command) -> None:
    code, _, log = command("quantize", served)
    assert code == 2
    assert "out PATH" in log


def test_the_default_texts_are_long_and_different() -> None:
    calibration, held_out = calibration_text(), held_out_text()
    assert min(len(calibration), len(held_out)) > 300_000
    lines = {line for line in calibration.splitlines() if len(line) > 60}
    same = sum(line in lines for line in held_out.splitlines() if len(line) > 60)
    assert same < 0.01 * len(held_out.splitlines())

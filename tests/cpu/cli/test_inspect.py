"""`fourfold inspect`: what a checkpoint holds, and what would be refused and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from fourfold.models.checkpoint.source import find_source
from fourfold.models.footprint import footprint
from fourfold.models.loading import open_checkpoint, read_model_config
from tests.cpu.cli.conftest import Command
from tests.cpu.gateway.made_tokenizers import write_default
from tests.cpu.models import default_model


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "mixtral", "olmoe"])
def test_a_checkpoint_that_would_be_served(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, command: Command
) -> None:
    path, words = checkpoint(family), write_default(tmp_path / "words")
    options = ("--precision", "float32", "--device", "cpu", "--tokenizer", words)
    code, out, err = command("inspect", path, *options)
    assert (code, err) == (0, "")
    reader = open_checkpoint(find_source(str(path)))
    _, config = read_model_config(reader.fields(), reader.where)
    parts = footprint(config)
    total, active = sum(p.total for p in parts), sum(p.active for p in parts)
    assert str(path) in out
    assert "4 query and 2 KV heads" in out
    for part in parts:
        assert re.search(rf"{part.name} +{part.total:,} +{part.active:,} ", out), part
    assert re.search(rf"all +{total:,} +{active:,} +{total * 4 / 2**30:.3f}", out)
    assert ("top 2 of" in out) == (family != "llama")
    if family == "qwen3-moe":
        assert "in 2 of 3 layers" in out
    assert out.endswith("It would be served.\n")


def test_a_configuration_that_would_be_refused(
    served: Path, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "odd"
    shutil.copytree(served, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 4096}))
    code, out, _ = command("inspect", path)
    assert code == 1
    assert "would be refused" in out
    assert "sliding_window = 4096" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("held", "says"), [(None, "--load dummy"), ("pytorch_model.bin", "convert the checkpoint")]
)
def test_a_folder_without_safetensors(
    held: str | None, says: str, served: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copy(served / "config.json", tmp_path)
    if held is not None:
        (tmp_path / held).touch()
    code, out, _ = command("inspect", tmp_path)
    assert code == 1
    assert says in out.split("has no *.safetensors; ")[1]


def test_tensors_that_would_be_refused(served: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "odd"
    shutil.copytree(served, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 330}))
    code, out, _ = command("inspect", path)
    assert code == 1
    assert "lm_head.weight is [320, 64], not [330, 64]" in out
    assert command("inspect", path, "--load", "dummy")[0] == 0


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("tokenizer.json", "{", "is not a readable tokenizer"),
        ("chat_template.jinja", "{% if %}", "chat template cannot be compiled"),
    ],
)
def test_words_that_would_be_refused(
    file: str, text: str, says: str, served: Path, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "odd"
    shutil.copytree(served, path)
    (path / file).write_text(text)
    code, out, err = command("inspect", path)
    assert (code, err) == (1, "")
    assert "would be refused" in out
    assert says in out
    assert command("inspect", path, "--tokenizer", served)[0] == 0


def test_uniform_routing_is_for_random_weights(served: Path, command: Command) -> None:
    code, _, err = command("inspect", served, "--routing", "uniform")
    assert code == 2
    assert "--load dummy" in err


def test_a_gguf_file_that_would_be_refused(tmp_path: Path, command: Command) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code, out, err = command("inspect", tmp_path / "other.gguf")
    assert (code, err) == (1, "")
    assert "would be refused" in out
    assert "gemma3" in out


def test_a_name_is_shown_as_it_is(served: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "tiny[red]-[/b]"
    shutil.copytree(served, path)
    code, out, _ = command("inspect", path, "--precision", "float32")
    assert code == 0
    assert str(path) in out


def test_the_default_model(command: Command) -> None:
    default_model.source()
    code, out, _ = command("inspect", "--precision", "float32")
    assert code == 0
    assert "top 2 of 8 experts of width 1536 in 30 of 30 layers" in out
    assert "share one storage" in out
    size = re.search(r"all .* ([\d.]+) *\n", out)
    assert size is not None
    assert 0.4 < float(size[1]) < 0.6, "what is shared is not counted eight times"

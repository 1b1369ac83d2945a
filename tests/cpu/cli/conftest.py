"""Tiny checkpoints that commands can serve: weights, tokenizer and chat template in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fourfold.cli.main import run
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway import made_tokenizers

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def served(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends a text by itself, so that its answers have known lengths."""
    path = tmp_path_factory.mktemp("served") / "tiny-mixtral"
    shutil.copytree(checkpoint("mixtral"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (path / "generation_config.json").unlink(missing_ok=True)
    backend = made_tokenizers.byte_level()
    return made_tokenizers.write(path, backend, chat_template=made_tokenizers.TEMPLATE)


@pytest.fixture(scope="session")
def words(served: Path) -> Tokenizer:
    return made_tokenizers.load(served)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: exit code, standard output, standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


@pytest.fixture
def small(served: Path) -> Sequence[str]:
    """The tiny model as arguments, with little memory."""
    return (str(served), "--precision", "float32", "--device", "cpu", "--kv-memory-gib", "0.02")

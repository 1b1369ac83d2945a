"""From what a user calls a model to a place on disk, or one line that says what was tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.source import (
    DEFAULT_MODEL_ID,
    DEFAULT_MODEL_PACKAGE,
    Source,
    SourceKind,
    find_source,
)


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_source(model)
    said = str(caught.value)
    assert "\n" not in said
    assert said.strip() == said
    return said


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.usefixtures("no_hub")
def test_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Source(SourceKind.DIRECTORY, directory, "my-model")
    assert find_source(str(directory)) == wanted
    monkeypatch.chdir(directory)
    assert find_source(".").model_id == "my-model"
    monkeypatch.setenv("HOME", str(directory.parent))
    assert find_source("~/my-model") == wanted


@pytest.mark.usefixtures("no_hub")
def test_a_directory_that_could_be_a_hub_id(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent.parent)
    name = f"{directory.parent.name}/my-model"
    assert find_source(name).path == Path(name)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_a_gguf_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"tiny.Q8_0{suffix}"
    file.write_bytes(b"GGUF")
    assert find_source(str(file)) == Source(SourceKind.GGUF, file, "tiny.Q8_0")


@pytest.mark.usefixtures("no_hub")
def test_what_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refused(str(tmp_path))
    file = tmp_path / "model.bin"
    file.touch()
    assert ".gguf" in refused(str(file))
    assert "not found" in refused(str(tmp_path / "missing"))
    assert "not found" in refused("no-such-model")
    assert "not found" in refused("a/b/c")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-that-name/x", ""])
def test_strange_names_are_one_line_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name)


def test_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_")) is None:
        pytest.skip(f"{DEFAULT_MODEL_PACKAGE} is not installed")
    source = find_source(None)
    assert source == find_source("default")
    assert (source.kind, source.model_id) == (SourceKind.EMBEDDED, DEFAULT_MODEL_ID)
    assert source.path.is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert DEFAULT_MODEL_PACKAGE in refused("default")


@pytest.mark.usefixtures("no_hub")
def test_only_a_hub_id_has_revisions(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.touch()
    for model in (None, "default", str(directory), str(file)):
        with pytest.raises(CheckpointError, match="revision main is of a hub id"):
            find_source(model, revision="main")


def test_a_hub_id_is_fetched(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def download(name: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = find_source("owner/a-model.v1", revision="abc")
    assert source == Source(SourceKind.DIRECTORY, directory, "owner/a-model.v1")
    assert asked == [("owner/a-model.v1", "abc")]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find it\nand more lines\n"),
        OSError("disk full"),
        ValueError("Repo id must be in the form"),
        OSError(),
    ],
)
def test_a_hub_that_fails_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "owner/model" in refused("owner/model")


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through huggingface_hub itself, with an address where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said = refused("owner/no-such-model")
    assert "owner/no-such-model" in said
    assert "network" in said

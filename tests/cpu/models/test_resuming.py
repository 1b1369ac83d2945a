"""What a kill can leave of a conversion's folder, and what is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import find_source
from fourfold.models.conversion.convert import Conversion, LayerReport, Texts
from fourfold.models.conversion.options import ConversionOptions, Method
from tests.cpu.models.test_conversion import CPU, convert, tokens

Find = Callable[[str], Path]
RTN = ConversionOptions(method=Method.RTN)
TEXTS = Texts(None, tokens(2, 2))
STATE, ASKED = "conversion.safetensors", "conversion.json"


class KillError(Exception):
    """A kill."""


@pytest.fixture(scope="module")
def model(checkpoint: Find) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that nothing befell."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(model, out, RTN, texts=TEXTS)
    return out


@pytest.fixture
def half(model: Path, tmp_path: Path) -> Path:
    """One that was killed after two of three layers."""

    def stop(layer: LayerReport) -> None:
        if layer.layer == 1:
            raise KillError

    out = tmp_path / "half"
    with pytest.raises(KillError):
        convert(model, out, RTN, texts=TEXTS, heard=stop)
    return out


def begin(model: Path, out: Path, options: ConversionOptions = RTN) -> Conversion:
    return Conversion(find_source(str(model)), options, TEXTS, out, CPU)


def assert_same(out: Path, whole: Path) -> None:
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_before_anything_was_asked(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{ASKED}.part").write_text("{")
    convert(model, out, RTN, texts=TEXTS)
    assert_same(out, whole)


@pytest.mark.parametrize("name", [STATE, "model-layer-00000.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"x" * 50])
def test_a_file_is_lost_or_broken(
    name: str, content: bytes | None, model: Path, whole: Path, half: Path
) -> None:
    """As a machine that loses its power can leave them."""
    (half / name).unlink()
    if content is not None:
        (half / name).write_bytes(content)
    assert begin(model, half).finished == 0
    convert(model, half, RTN, texts=TEXTS)
    assert_same(half, whole)


def test_parts_of_files_do_not_stay(model: Path, whole: Path, half: Path) -> None:
    (half / f"{ASKED}.part").write_text("{")
    convert(model, half, RTN, texts=TEXTS)
    assert_same(half, whole)


def test_after_the_last_file_was_written(
    model: Path, whole: Path, half: Path, tmp_path: Path
) -> None:
    """All is there; what only a conversion that goes on needs is removed by the next command."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in (STATE, ASKED):
        shutil.copyfile(half / name, out / name)
    with pytest.raises(ConfigError, match="finished checkpoint"):
        begin(model, out)
    assert_same(out, whole)


def test_two_at_once(model: Path, whole: Path, tmp_path: Path) -> None:
    """They would write the same files into each other."""
    out = tmp_path / "out"
    second = begin(model, out)

    def try_too(layer: LayerReport) -> None:
        for write in (
            lambda: begin(model, out),
            lambda: second.run(lambda _: None, lambda _: None),
        ):
            with pytest.raises(ConfigError, match="another conversion"):
                write()

    convert(model, out, RTN, texts=TEXTS, heard=try_too)
    assert_same(out, whole)


def test_one_after_another(model: Path, whole: Path, tmp_path: Path) -> None:
    """One that looked at the folder before another went on there and was killed."""

    def stop(layer: LayerReport) -> None:
        raise KillError

    out = tmp_path / "out"
    early = begin(model, out)
    with pytest.raises(KillError):
        convert(model, out, RTN, texts=TEXTS, heard=stop)
    heard: list[int] = []
    early.run(lambda _: None, lambda layer: heard.append(layer.layer))
    assert heard == [1, 2]
    assert_same(out, whole)


def test_the_same_text_cut_otherwise_is_another(model: Path, tmp_path: Path) -> None:
    def stop(layer: LayerReport) -> None:
        raise KillError

    texts = Texts(TEXTS.held_out_NL, TEXTS.held_out_NL)
    cut = Texts(TEXTS.held_out_NL.view(4, 16), TEXTS.held_out_NL)
    source, out = find_source(str(model)), tmp_path / "out"
    with pytest.raises(KillError):
        Conversion(source, ConversionOptions(), texts, out, CPU).run(lambda _: None, stop)
    assert Conversion(source, ConversionOptions(), texts, out, CPU).finished == 1
    with pytest.raises(ConfigError, match="with other options"):
        Conversion(source, ConversionOptions(), cut, out, CPU)

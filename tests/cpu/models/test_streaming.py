"""Reading parts of files: what arrives is what is in the files, however it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint import streaming
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.streaming import FilePart, StreamingReader, plan_chunks

CPU = torch.device("cpu")
FILES = (Path("a"), Path("b"))

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


@given(
    sizes=st.lists(st.tuples(st.sampled_from(FILES), st.integers(0, 300), st.integers(0, 400))),
    limit=st.integers(1, 1000),
    seed=st.randoms(),
)
def test_chunks_hold_every_part_once_and_keep_the_limit(
    sizes: list[tuple[Path, int, int]], limit: int, seed: object
) -> None:
    parts, ends = [], dict.fromkeys(FILES, 0)
    for file, gap, nbytes in sizes:
        parts.append(FilePart(file, ends[file] + gap, nbytes))
        ends[file] += gap + nbytes
    seed.shuffle(parts)  # type: ignore[attr-defined]
    chunks = plan_chunks(parts, limit)
    assert sorted(place for chunk in chunks for place in chunk.parts) == list(range(len(parts)))
    for chunk in chunks:
        held = [parts[place] for place in chunk.parts]
        assert held == sorted(held)
        assert all(part.file == chunk.file for part in held)
        assert chunk.start <= held[0].start
        assert chunk.end == max(part.end for part in held)
        assert chunk.end - chunk.start <= limit + 64 or len(held) == 1


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, Tensor]:
    """A file of bytes, and the bytes."""
    content = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    file = tmp_path / "numbers"
    file.write_bytes(content.numpy().tobytes())
    return file, content


@pytest.mark.parametrize("chunk", [100, 1000, 1 << 20])
def test_parts_of_any_size_arrive(
    chunk: int, numbers: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far smaller and far larger than a buffer, near to each other and not."""
    file, content = numbers
    monkeypatch.setattr(streaming, "_READ", 64)
    monkeypatch.setattr(streaming, "_GAP", 50)
    starts = [0, 3, 40, 99, 500, 560, 570, 4000, 4001, 9000, 70_000]
    sizes = [3, 30, 59, 1, 60, 0, 1000, 1, 4999, 30_000, 30_000]
    parts = [FilePart(file, *part) for part in zip(starts, sizes, strict=True)]
    reader = StreamingReader(CPU, chunk_bytes=chunk)
    for wanted in (parts, parts[::-1], parts[3:4], []):
        arrived = {place: raw.clone() for place, raw in reader.read(wanted)}
        assert sorted(arrived) == list(range(len(wanted)))
        for place, part in enumerate(wanted):
            assert torch.equal(arrived[place], content[part.start : part.end])


def test_a_file_that_ends_too_early_is_named(numbers: tuple[Path, Tensor]) -> None:
    file, _ = numbers
    with pytest.raises(CheckpointError, match="numbers ends too early"):
        list(StreamingReader(CPU).read([FilePart(file, 99_000, 2000)]))


@pytest.mark.parametrize("chunk", [128, 1 << 20])
def test_a_checkpoint_streams_what_it_maps(chunk: int, tmp_path: Path) -> None:
    """Every dtype, in files whose tensors have odd sizes."""
    tensors = {
        f"{dtype}.{size}.weight": (torch.randn(size, 3) * 50).to(dtype)
        for dtype in DTYPES
        for size in (1, 5, 40)
    }
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{number}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = DirectoryCheckpoint(tmp_path)
    reader = StreamingReader(CPU, chunk_bytes=chunk)
    mapped = {name: tensor for name, _, tensor in checkpoint.parts(set(tensors))}
    streamed = {name: tensor.clone() for name, _, tensor in checkpoint.parts(set(tensors), reader)}
    assert set(mapped) == set(streamed) == set(tensors)
    for name, tensor in tensors.items():
        for read in (mapped[name], streamed[name]):
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)), name

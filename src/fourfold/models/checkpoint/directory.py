"""A Hugging Face directory: config.json and one or more safetensors files, memory-mapped or
streamed to a GPU.

Where config.json has a quantization_config that we honour, weights are presented under their plain
names as what their codes stand for, and the field is not shown.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.config_json import read_config_json
from fourfold.models.checkpoint.fourfold_format import FourfoldFormat, read_fourfold
from fourfold.models.checkpoint.published import (
    PublishedFormat,
    Stored,
    read_published,
    stored_twice,
)
from fourfold.models.checkpoint.streaming import FilePart, StreamingReader

_QUANTISATION = "quantization_config"
_CONTENTS = "weight_shape"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth")
_INTEGERS = ("I64", "I32")
# What weights may be stored in; anything else holds the codes of some quantisation.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class _Entry(NamedTuple):
    """One stored tensor. `shape` is what it holds where it is a `weight_shape`, `stored_shape` is
    always its own."""

    part: FilePart
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: str


class DirectoryCheckpoint:
    """The tensors of all `*.safetensors` files that the index names, or of all there are."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def fields(self) -> Mapping[str, Any]:
        fields = dict(self._config)
        if self._format is not None:
            del fields[_QUANTISATION]
        return fields

    @property
    def quantised(self) -> FourfoldFormat | None:
        """How its weights are packed, where they are packed as we serve them."""
        return self._format if isinstance(self._format, FourfoldFormat) else None

    def coded(self) -> Set[str]:
        """The plain names of the weights that are stored as codes."""
        return self._coded.keys()

    def stored_names(self) -> Set[str]:
        """Every tensor in the files."""
        return self._index.keys()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        plain = {name: self._index[name].shape for name in self._plain}
        return plain | {name: stored.shape for name, stored in self._coded.items()}

    def nbytes(self, name: str) -> int:
        return sum(self._index[stored].part.nbytes for stored in self._parts(name).values())

    def tensors(
        self, names: set[str], reader: StreamingReader | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        held: dict[str, dict[str, Tensor]] = {}
        for name, part, tensor in self.parts(names, reader):
            stored = self._coded.get(name)
            if stored is None or self._format is None:
                yield name, tensor
                continue
            parts = held.setdefault(name, {})
            # What was streamed is gone when the next part comes.
            parts[part] = tensor.clone() if reader else tensor
            if len(parts) == len(stored.names):
                yield name, self._format.decode(name, stored, held.pop(name))

    def parts(
        self, names: set[str], reader: StreamingReader | None = None
    ) -> Iterator[tuple[str, str, Tensor]]:
        """The named weights as they are in the files, in their order: (name, part, tensor), the
        parts being what a weight is made of, by suffix. A tensor that is stored plainly is its own
        `weight`. With or without a reader as `Checkpoint.tensors`."""
        wanted = [
            (self._index[stored], name, part)
            for name in names
            for part, stored in self._parts(name).items()
        ]
        if reader is not None:
            for place, raw in reader.read([entry.part for entry, _, _ in wanted]):
                entry, name, part = wanted[place]
                yield name, part, _typed(raw, entry)
            return
        with contextlib.ExitStack() as opened:

            @functools.cache
            def file(path: Path) -> Any:
                return opened.enter_context(safe_open(path, framework="pt"))

            for entry, name, part in sorted(wanted, key=lambda tensor: tensor[0].part):
                yield name, part, file(entry.part.file).get_tensor(self._parts(name)[part])

    def _parts(self, name: str) -> Mapping[str, str]:
        coded = self._coded.get(name)
        return {"weight": name} if coded is None else coded.names

    @functools.cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_config_json(self._path)

    @functools.cached_property
    def _format(self) -> PublishedFormat | FourfoldFormat | None:
        config = self._config.get(_QUANTISATION)
        if config is None:
            return None
        if isinstance(config, dict) and config.get("quant_method") == "fourfold":
            return read_fourfold(config, self.where)
        return read_published(config, self.where)

    @functools.cached_property
    def _coded(self) -> Mapping[str, Stored]:
        """The weights that are stored as codes, by their plain names."""
        if self._format is None:
            return {}
        coded = self._format.weights(
            {name: entry.shape for name, entry in self._index.items()},
            {name: entry.dtype for name, entry in self._index.items()},
        )
        for name, stored in coded.items():
            if name in self._index and name not in stored.names.values():
                raise stored_twice(self.where, name.removesuffix(".weight"))
        return coded

    @functools.cached_property
    def _plain(self) -> list[str]:
        """The tensors that are stored as what they are."""
        format, coded = self._format, self._coded
        plain = [
            name
            for name in self._index
            if name not in coded and (format is None or not format.is_companion(name, coded))
        ]
        codes = [
            f"{name} ({self._index[name].dtype})"
            for name in plain
            if self._index[name].dtype not in _FLOATS
        ]
        if codes:
            shown = f"{', '.join(codes[:4])}{', ...' if len(codes) > 4 else ''}"
            raise CheckpointError(
                f"{self._path}: {len(codes)} tensors are not floating-point weights: {shown}; "
                "use a checkpoint that is not quantised"
            )
        return plain

    @functools.cached_property
    def _index(self) -> dict[str, _Entry]:
        index: dict[str, _Entry] = {}
        for file in self._files():
            try:
                # Opening checks that the file is whole and its header true.
                with safe_open(file, framework="pt") as opened:
                    for name, part, shape, dtype in _read_header(file):
                        held = shape
                        if name.rpartition(".")[2] == _CONTENTS:
                            if dtype not in _INTEGERS:
                                raise CheckpointError(
                                    f"{file}: {name} is {dtype}, not integers; fetch it again"
                                )
                            held = tuple(opened.get_tensor(name).flatten().tolist())
                        if name in index:
                            raise CheckpointError(
                                f"{self._path} has {name} in {index[name].part.file.name} and in "
                                f"{file.name}; leave only the files of one checkpoint there"
                            )
                        index[name] = _Entry(part, held, shape, dtype)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error
        return index

    def _files(self) -> list[Path]:
        index = self._path / "model.safetensors.index.json"
        if index.is_file():
            try:
                fields = json.loads(index.read_text(encoding="utf-8"))
                names = sorted(set(fields["weight_map"].values()))
                missing = [name for name in names if not (self._path / name).is_file()]
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise CheckpointError(
                    f"{index} does not map tensors to files ({error}); fetch it again"
                ) from error
            if missing:
                raise CheckpointError(f"{self._path} lacks {', '.join(missing)}; fetch it again")
            return [self._path / name for name in names]
        files = sorted(self._path.glob("*.safetensors"))
        if not files:
            if any(path.suffix in _OTHER_WEIGHTS for path in self._path.iterdir()):
                remedy = "convert the checkpoint to safetensors first"
            else:
                remedy = "fetch them, or take random weights with --load dummy"
            raise CheckpointError(f"{self._path} has no *.safetensors; {remedy}")
        return files


def _read_header(file: Path) -> Iterator[tuple[str, FilePart, tuple[int, ...], str]]:
    """Name, place, shape and dtype of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    for name, fields in header.items():
        if name != "__metadata__":
            start, end = fields["data_offsets"]
            part = FilePart(file, 8 + size + start, end - start)
            yield name, part, tuple(fields["shape"]), fields["dtype"]


def _typed(raw: Tensor, entry: _Entry) -> Tensor:
    """Bytes as the tensor that they are."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{entry.part.file} has tensors of {entry.dtype}, which is not known")
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(entry.stored_shape)

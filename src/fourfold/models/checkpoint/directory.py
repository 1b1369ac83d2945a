"""A Hugging Face directory: config.json and one or more memory-mapped safetensors files."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourfold.errors import CheckpointError

# What weights may be stored in; anything else holds the codes of some quantisation.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


class DirectoryCheckpoint:
    """The tensors of all `*.safetensors` files that the index names, or of all there are."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def fields(self) -> Mapping[str, Any]:
        file = self._path / "config.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not readable JSON ({error})") from error
        if not isinstance(fields, dict):
            raise CheckpointError(f"{file} is not a JSON object")
        return fields

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape, _) in self._index.items()}

    def nbytes(self, name: str) -> int:
        return self._index[name][2]

    def tensors(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        for file in sorted({self._index[name][0] for name in names}):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is not iterable)
                    if name in names:
                        yield name, opened.get_tensor(name)

    @functools.cached_property
    def _index(self) -> dict[str, tuple[Path, tuple[int, ...], int]]:
        """File, shape and bytes of every tensor."""
        index = {}
        codes = []
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        stored = opened.get_slice(name)
                        shape = tuple(stored.get_shape())
                        dtype = stored.get_dtype()
                        if dtype not in _BITS:
                            codes.append(f"{name} ({dtype})")
                        bits = _BITS.get(dtype, 0)
                        index[name] = file, shape, math.prod(shape) * bits // 8
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error
        if codes:
            shown = f"{', '.join(codes[:4])}{', ...' if len(codes) > 4 else ''}"
            raise CheckpointError(
                f"{self._path}: {len(codes)} tensors are not floating-point weights: {shown}; "
                "use a checkpoint that is not quantised"
            )
        return index

    def _files(self) -> list[Path]:
        index = self._path / "model.safetensors.index.json"
        if index.is_file():
            try:
                fields = json.loads(index.read_text(encoding="utf-8"))
                names = sorted(set(fields["weight_map"].values()))
                missing = [name for name in names if not (self._path / name).is_file()]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} does not map tensors to files ({error}); fetch it again"
                ) from error
            if missing:
                raise CheckpointError(f"{self._path} lacks {', '.join(missing)}; fetch it again")
            return [self._path / name for name in names]
        files = sorted(self._path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self._path} has no *.safetensors; convert the checkpoint to safetensors first"
            )
        return files

"""The folder that a conversion writes: one file a layer, so that what is finished stays finished.

Files appear whole (written beside, then renamed) and config.json last, so a folder that a
conversion was interrupted in is no checkpoint yet. Until then it holds `conversion.json`, which
says what was asked for, and `conversion.safetensors`, the text's state before the next layer: what
fails, however late, costs no finished layer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.files import flush
from fourfold.kernels.w4a8_gemm.packing import PackedW4A8
from fourfold.models.checkpoint.fourfold_format import stored_parts
from fourfold.models.conversion.simulated import Codes
from fourfold.models.families.family import Placements

_ASKED = "conversion.json"
_STATE = "conversion.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = ".part"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
_ENDS = "model-ends.safetensors"
_PARTS = ("weight_packed", "weight_group", "weight_codes", "weight_scale")


class Output:
    """A conversion's folder. `asked` is everything that the result depends on."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self._asked = dict(asked)
        try:
            if (path / "config.json").exists():
                if (path / _ASKED).is_file():
                    self._forget()
                raise ConfigError(f"{path} holds a finished checkpoint; name another --out")
            held = {file.name for file in path.iterdir()} if path.is_dir() else set()
            # A kill before anything was asked leaves the part of a file.
            if not held <= {f"{_ASKED}{_PART}"} and not (path / _ASKED).is_file():
                raise ConfigError(
                    f"{path} is not empty and no conversion of ours; name another --out"
                )
            path.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self._resume()
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error}); name another --out") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from writing the folder meanwhile. `ConfigError` where one does."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise ConfigError(
                f"{self.path} is being written by another conversion; wait for its end, or name "
                "another --out"
            ) from None
        except OSError:
            pass  # Some network file systems lock no folders.
        try:
            yield
        finally:
            os.close(folder)

    def _resume(self) -> None:
        for left in self.path.glob(f"*{_PART}"):
            left.unlink()
        file = self.path / _ASKED
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                before = None
            if before == self._asked:
                return
            if before is not None and (finished := self.finished_layers()):
                raise ConfigError(
                    f"{self.path} holds {finished} finished layers of a conversion of another "
                    "model or with other options; give those to go on, remove the folder to begin "
                    "anew, or name another --out"
                )
            (self.path / _STATE).unlink(missing_ok=True)
            for left in self.path.glob("model-*.safetensors"):
                left.unlink()
        _write_json(file, self._asked)

    def finished_layers(self) -> int:
        """How many layers need not be converted again: none where not all that were finished, and
        the text's state after them, can be read."""
        state = self.path / _STATE
        if not state.is_file():
            return 0
        try:
            with safe_open(state, framework="pt") as opened:
                layers = int(opened.get_tensor("layers"))
            for file in self._layer_files(layers):
                with safe_open(file, framework="pt"):
                    pass
        except (SafetensorError, OSError):
            return 0
        return layers

    def _layer_files(self, layers: int) -> list[Path]:
        return [self.path / f"model-layer-{layer:05}.safetensors" for layer in range(layers)]

    def _forget(self) -> None:
        """Removes what only an unfinished conversion needs."""
        for left in (_STATE, _ASKED):
            (self.path / left).unlink(missing_ok=True)

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """What `write_layer` kept last."""
        kept: dict[str, Tensor] = load_file(self.path / _STATE, device=str(device))
        return kept

    def write_layer(
        self, layer: int, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Keeps a layer's tensors, then what the next layer needs."""
        _write_tensors(self._layer_files(layer + 1)[-1], tensors)
        kept = dict(state) | {"layers": torch.tensor(layer + 1)}
        _write_tensors(self.path / _STATE, kept)

    def finish(
        self,
        layers: int,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        original: Path | None,
        write_tokenizer: Callable[[Path], None],
    ) -> None:
        """Writes embedding and head (`tensors`) beside so many layers, the index, what serving
        needs besides weights, and, last, config.json. `original` is a folder whose tokenizer and
        generation settings are copied."""
        _write_tensors(self.path / _ENDS, tensors)
        places, total = {}, 0
        for file in (*self._layer_files(layers), self.path / _ENDS):
            total += file.stat().st_size
            with safe_open(file, framework="pt") as opened:
                places.update(dict.fromkeys(opened.keys(), file.name))
        _write_json(self.path / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        if original is not None:
            for pattern in _COPIED:
                for file in original.glob(pattern):
                    if file.is_file() and file.name not in ("config.json", _INDEX, _ASKED):
                        with _replacing(self.path / file.name) as beside:
                            shutil.copyfile(file, beside)
        try:
            write_tokenizer(self.path)
        except OSError as error:
            raise _unwritten(self.path, error) from error
        _write_json(self.path / "config.json", config)
        self._forget()

    def bits_per_weight(self) -> float:
        """What quantised weights take with their scales, of the files that are there."""
        bits = weights = 0
        for file in self.path.glob("model-*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is not iterable)
                    kind = name.rpartition(".")[2]
                    if kind == "weight_shape":
                        weights += int(opened.get_tensor(name).prod())
                    elif kind in _PARTS:
                        part = opened.get_slice(name)
                        bits += 8 * math.prod(part.get_shape()) * part[:0].element_size()
        return bits / max(weights, 1)


def coded_tensors(
    placements: Placements, codes: Mapping[str, Codes], plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is stored of a part of a model, by Hugging Face names: `codes` and `plain` are its
    parameters, by the names that placements give them."""
    stored = {}
    for name, place in placements.items():
        rows = slice(place.start, place.start + place.shape[0])
        whole = codes.get(place.parameter)
        if whole is None:
            values = plain[place.parameter]
            values = values if place.expert is None else values[place.expert]
            stored[name] = values[rows].contiguous()
            continue
        slot, module = place.expert or 0, name.removesuffix("weight")
        if isinstance(whole, PackedW4A8):
            parts = stored_parts(whole, slot, rows)
        else:
            parts = {
                "weight_codes": whole.codes_EOI[slot, rows].contiguous(),
                "weight_scale": whole.scale_EO[slot, rows].contiguous(),
                "weight_shape": torch.tensor(place.shape),
            }
        stored |= {f"{module}{part}": tensor for part, tensor in parts.items()}
    return stored


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with _replacing(file) as beside:
        beside.touch()
        usual = beside.stat().st_mode
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, beside, {"format": "pt"})
        # Some versions of safetensors leave what only its owner can read.
        beside.chmod(usual)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with _replacing(file) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Where to write what replaces a file once it is whole; nothing of it is left otherwise.
    `ConfigError` where it cannot be written."""
    # The same name each time, so that what a kill leaves of a layer is written over.
    beside = file.with_name(f"{file.name}{_PART}")
    try:
        yield beside
        flush(beside)
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        raise _unwritten(file, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _unwritten(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written ({error}); free some space or mend what is wrong with the "
        "folder: the same command goes on after the layers that are finished"
    )

"""The folder that a conversion writes: one file a layer, so that what is finished stays finished.

Files appear whole (written beside, then renamed) and config.json last, so a folder that a
conversion was interrupted in is no checkpoint yet. Until then it holds `conversion.json`, which
says what was asked for, and `conversion.safetensors`, the text's state before the next layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.kernels.w4a8_gemm.packing import PackedW4A8
from fourfold.models.checkpoint.fourfold_format import stored_parts
from fourfold.models.conversion.simulated import Codes
from fourfold.models.families.family import Placements

_ASKED = "conversion.json"
_STATE = "conversion.safetensors"
_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
_ENDS = "model-ends.safetensors"
_PARTS = ("weight_packed", "weight_group", "weight_codes", "weight_scale")


class Output:
    """A conversion's folder. `asked` is everything that the result depends on."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.restarted = False
        """Whether another conversion's remains were removed."""
        self._asked = dict(asked)
        if (path / "config.json").exists():
            raise ConfigError(f"{path} holds a finished checkpoint; name another --out")
        if path.is_dir() and any(path.iterdir()) and not (path / _ASKED).is_file():
            raise ConfigError(f"{path} is not empty and no conversion of ours; name another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._resume()
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error}); name another --out") from error

    def _resume(self) -> None:
        file = self.path / _ASKED
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                before = None
            if before == self._asked:
                return
            self.restarted = True
            for left in self.path.glob("*.safetensors"):
                left.unlink()
        _write_json(file, self._asked)

    def finished_layers(self) -> int:
        """How many layers need not be converted again."""
        state = self.path / _STATE
        if not state.is_file():
            return 0
        with safe_open(state, framework="pt") as opened:
            return int(opened.get_tensor("layers"))

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """What `write_layer` kept last."""
        kept: dict[str, Tensor] = load_file(self.path / _STATE, device=str(device))
        return kept

    def write_layer(
        self, layer: int, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Keeps a layer's tensors, then what the next layer needs."""
        _write_tensors(self.path / f"model-layer-{layer:05}.safetensors", tensors)
        kept = dict(state) | {"layers": torch.tensor(layer + 1)}
        _write_tensors(self.path / _STATE, kept)

    def finish(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        original: Path | None,
        write_tokenizer: Callable[[Path], None],
    ) -> None:
        """Writes embedding and head, the index, what serving needs besides weights, and, last,
        config.json. `original` is a folder whose tokenizer and generation settings are copied."""
        _write_tensors(self.path / _ENDS, tensors)
        (self.path / _STATE).unlink(missing_ok=True)
        places, total = {}, 0
        for file in sorted(self.path.glob("model-*.safetensors")):
            total += file.stat().st_size
            with safe_open(file, framework="pt") as opened:
                places.update(dict.fromkeys(opened.keys(), file.name))
        _write_json(self.path / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        if original is not None:
            for pattern in _COPIED:
                for file in original.glob(pattern):
                    if file.name not in ("config.json", _INDEX, _ASKED):
                        shutil.copyfile(file, self.path / file.name)
        write_tokenizer(self.path)
        _write_json(self.path / "config.json", config)
        (self.path / _ASKED).unlink()

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
                        part = opened.get_tensor(name)
                        bits += 8 * part.numel() * part.element_size()
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
    beside = file.with_suffix(".part")
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, beside, {"format": "pt"})
    os.replace(beside, file)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, file)

"""Fills a model from a checkpoint of ours, whose weights are packed as they are served.

Nothing is rotated or rounded: parts of a matrix are laid beside each other and go to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import PackedW4A8
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.fourfold_format import K_OFFSET, FourfoldFormat
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Placement, Placements
from fourfold.models.filling import CheckpointFiller, Progress
from fourfold.models.rotation import input_turn
from fourfold.quantize.weights import Weight, from_int8, from_packed

_TURNED = (".ffn.down.weight", ".ffn.shared.down.weight", ".experts.down")


class PackedFiller:
    """Fills every parameter of a model."""

    def __init__(
        self,
        model: Decoder,
        placements: Placements,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: DirectoryCheckpoint,
        progress: Progress,
    ) -> None:
        assert checkpoint.quantised is not None
        self._model, self._device, self._checkpoint = model, device, checkpoint
        self._format: FourfoldFormat = checkpoint.quantised
        self._progress = progress
        self._done = 0
        self._total = sum(checkpoint.nbytes(name) for name in placements)
        coded = checkpoint.coded()
        plain = {n: place for n, place in placements.items() if n not in coded}
        self._plain = CheckpointFiller(
            model, plain, device, dtype, checkpoint, lambda done, _: progress(done, self._total)
        )
        self._plain_bytes = sum(checkpoint.nbytes(name) for name in plain)
        self._coded: dict[str, dict[str, Placement]] = {}
        for name, place in placements.items():
            if name in coded:
                self._coded.setdefault(place.parameter, {})[name] = place

    def fill(self) -> None:
        """Reads the whole checkpoint."""
        self._plain.fill("")
        self._done = self._plain_bytes
        for parameter, places in self._coded.items():
            owner, _, attribute = parameter.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, self._weight(parameter, places))
        for layer, block in enumerate(self._model.blocks):
            name = f"model.layers.{layer}.self_attn.{K_OFFSET}"
            if name in self._checkpoint.stored_names():
                ((_, parts),) = self._checkpoint.stored({name})
                block.attention.k_offset_GC = parts["weight"].to(self._device)

    def _weight(self, parameter: str, places: Mapping[str, Placement]) -> Weight:
        """One matrix, or a stack of experts' matrices, of the tensors that hold its rows."""
        inputs = next(iter(places.values())).shape[1]
        rows = max(place.start + place.shape[0] for place in places.values())
        slots = 1 + max(place.expert or 0 for place in places.values())
        whole: dict[str, Tensor] = {}
        for name, parts in self._read(places):
            place = places[name]
            span = slice(place.start, place.start + place.shape[0])
            for part, tensor in parts.items():
                axis = _ROW_AXIS.get(part)
                if axis is None:
                    continue
                if part not in whole:
                    shape = list(tensor.shape)
                    shape[axis] = rows
                    whole[part] = torch.empty(slots, *shape, dtype=tensor.dtype)
                whole[part][place.expert or 0].transpose(0, axis)[span] = tensor.transpose(0, axis)
        on_device = {part: tensor.to(self._device) for part, tensor in whole.items()}
        if "weight_codes" in on_device:
            return from_int8(on_device["weight_codes"], on_device["weight_scale"])
        turn = input_turn(inputs) if parameter.endswith(_TURNED) else None
        packed = PackedW4A8(
            self._format.recipe,
            inputs,
            on_device["weight_packed"],
            on_device["weight_scale"],
            on_device.get("weight_group"),
        )
        return from_packed(packed, None if turn is None else turn.to(self._device))

    def _read(self, places: Mapping[str, Placement]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        for name, parts in self._checkpoint.stored(set(places)):
            yield name, parts
            self._done += self._checkpoint.nbytes(name)
            self._progress(self._done, self._total)


_ROW_AXIS = {"weight_packed": 1, "weight_group": 1, "weight_codes": 0, "weight_scale": 0}

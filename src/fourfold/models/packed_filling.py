"""Fills a model from a checkpoint of ours, whose weights are packed as they are served.

Nothing is rotated or rounded: parts of a matrix are laid beside each other on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import PackedW4A8
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.fourfold_format import K_OFFSET, FourfoldFormat
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Placement, Placements
from fourfold.models.filling import CheckpointFiller, Progress
from fourfold.models.rotation import TURNED, input_turn
from fourfold.quantize.weights import Weight, from_int8, from_packed


class PackedFiller:
    """A `ModelFiller`."""

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
        self._total = sum(checkpoint.nbytes(name) for name in placements)
        coded = checkpoint.coded()
        plain = {n: place for n, place in placements.items() if n not in coded}
        self._done = self._plain_done = 0
        self._plain = CheckpointFiller(
            model, plain, device, dtype, checkpoint, lambda done, _: self._heard(done)
        )
        self._coded = {n: place for n, place in placements.items() if n in coded}

    def fill_ends(self) -> None:
        for part in ("embedding.", "norm.", "head."):
            self._fill(part)

    def fill_layer(self, layer: int) -> None:
        self._fill(f"layers.{layer}.")
        name = f"model.layers.{layer}.self_attn.{K_OFFSET}"
        if name in self._checkpoint.stored_names():
            ((_, _, offset_GC),) = self._checkpoint.parts({name})
            self._model.blocks[layer].attention.k_offset_GC = offset_GC.to(self._device)

    def _fill(self, prefix: str) -> None:
        """Fills the parameters whose name begins so."""
        self._plain.fill(prefix)
        self._fill_coded({n: p for n, p in self._coded.items() if p.parameter.startswith(prefix)})

    def _fill_coded(self, places: Placements) -> None:
        """Gives the parameters of some weights their codes."""
        by_parameter: dict[str, list[Placement]] = {}
        for place in places.values():
            by_parameter.setdefault(place.parameter, []).append(place)
        whole = {name: _Whole(rows, self._device) for name, rows in by_parameter.items()}
        for name, part, tensor in self._checkpoint.parts(set(places), self._plain.reader):
            place = places[name]
            whole[place.parameter].put(part, place, tensor)
            self._done += tensor.nbytes
            self._heard(self._plain_done)
        for parameter, parts in whole.items():
            owner, _, attribute = parameter.rpartition(".")
            weight = self._weight(parameter, parts)
            setattr(self._model.get_submodule(owner), attribute, weight)

    def _heard(self, plain_done: int) -> None:
        self._plain_done = plain_done
        self._progress(self._done + plain_done, self._total)

    def _weight(self, parameter: str, whole: _Whole) -> Weight:
        parts = whole.parts
        if "weight_codes" in parts:
            return from_int8(parts["weight_codes"], parts["weight_scale"])
        turn = input_turn(whole.inputs) if parameter.endswith(TURNED) else None
        packed = PackedW4A8(
            self._format.recipe,
            whole.inputs,
            parts["weight_packed"],
            parts["weight_scale"],
            parts.get("weight_group"),
        )
        return from_packed(packed, None if turn is None else turn.to(self._device))


class _Whole:
    """One matrix, or a stack of experts' matrices, put together from the tensors that hold its
    rows: `parts` are stacks [slots, ...]."""

    def __init__(self, places: Sequence[Placement], device: torch.device) -> None:
        self.inputs = places[0].shape[1]
        self.parts: dict[str, Tensor] = {}
        self._rows = max(place.start + place.shape[0] for place in places)
        self._slots = 1 + max(place.expert or 0 for place in places)
        self._device = device

    def put(self, part: str, place: Placement, tensor: Tensor) -> None:
        """Lays a part of some rows where it belongs."""
        axis = _ROW_AXIS.get(part)
        if axis is None:
            return
        if part not in self.parts:
            shape = list(tensor.shape)
            shape[axis] = self._rows
            self.parts[part] = torch.empty(
                self._slots, *shape, dtype=tensor.dtype, device=self._device
            )
        target = self.parts[part][place.expert or 0]
        target.narrow(axis, place.start, place.shape[0]).copy_(tensor)


_ROW_AXIS = {"weight_packed": 1, "weight_group": 1, "weight_codes": 0, "weight_scale": 0}

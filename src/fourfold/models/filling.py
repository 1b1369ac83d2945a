"""Puts tensors where they belong in a `Decoder` built without storage."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
import xxhash
from torch import Tensor, nn

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.streaming import StreamingReader
from fourfold.models.checkpoint.tensors import Checkpoint
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Placement, Placements
from fourfold.models.router import Router
from fourfold.quantize.weights import DenseWeight

DEVIATION = 0.02
"""Of random weights."""
_PIECE = 1 << 30
"""Numbers that are looked through at once: a layer can have more than 32 bits count."""

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


class ModelFiller(Protocol):
    """Fills a model for the precision that it is served in: its ends (embedding, last norm, head),
    then each layer in turn."""

    def fill_ends(self) -> None: ...

    def fill_layer(self, layer: int) -> None: ...


class Filler(abc.ABC):
    """Fills a model part by part; `placements` are what is still to be placed."""

    def __init__(
        self, model: Decoder, placements: Placements, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._left = dict(placements)
        self._device = device
        self._dtype = dtype

    @abc.abstractmethod
    def _tensors(self, placements: Placements) -> Iterator[tuple[str, Tensor]]:
        """The tensors to place, by their names in the checkpoint."""

    def fill(self, prefix: str) -> Mapping[str, Tensor]:
        """Gives every parameter whose name begins so its storage and its values; returns them."""
        part = {n: place for n, place in self._left.items() if place.parameter.startswith(prefix)}
        self._left = {n: place for n, place in self._left.items() if n not in part}
        storage = {place.parameter: None for place in part.values()}
        data = {parameter: self._allocate(parameter) for parameter in storage}
        for name, tensor in self._tensors(part):
            place = part[name]
            _rows_of(place, data).copy_(tensor)
        return data

    def _allocate(self, parameter: str) -> Tensor:
        path, attribute = parameter.rsplit(".", 1)
        owner: nn.Module = self._model.get_submodule(path)
        if isinstance(getattr(owner, attribute), DenseWeight):
            owner, attribute = getattr(owner, attribute), "weight"
        shape = getattr(owner, attribute).shape
        dtype = torch.float32 if isinstance(owner, Router) else self._dtype
        data = torch.empty(shape, dtype=dtype, device=self._device)
        setattr(owner, attribute, nn.Parameter(data, requires_grad=False))
        return data


class CheckpointFiller(Filler):
    """Fills from a checkpoint's tensors, streamed if it fills a GPU, and tells how far it is."""

    def __init__(
        self,
        model: Decoder,
        placements: Placements,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: Checkpoint,
        progress: Progress,
    ) -> None:
        super().__init__(model, placements, device, dtype)
        self._placements = placements
        self._checkpoint = checkpoint
        self._progress = progress
        self.reader = StreamingReader(device) if device.type == "cuda" else None
        self._done = 0
        self._total = sum(checkpoint.nbytes(name) for name in placements)

    def _tensors(self, placements: Placements) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._checkpoint.tensors(set(placements), self.reader):
            yield name, tensor
            self._done += self._checkpoint.nbytes(name)
            self._progress(self._done, self._total)

    def fill(self, prefix: str) -> Mapping[str, Tensor]:
        """Raises `CheckpointError` naming a tensor that holds infinities or NaN: with one of them
        some answers are nonsense, and codes have a scale that says nothing."""
        data = super().fill(prefix)
        # One pass, no copies, and the device is waited for once.
        pieces = [
            piece for values in data.values() for piece in torch.split(values.view(-1), _PIECE)
        ]
        ends = [end.float() for piece in pieces for end in piece.aminmax()]
        if ends and not bool(torch.stack(ends).isfinite().all()):
            filled = ((n, p) for n, p in self._placements.items() if p.parameter in data)
            name = next(n for n, p in filled if not _rows_of(p, data).isfinite().all())
            raise CheckpointError(
                f"{self._checkpoint.where}: {name} holds numbers that are not finite; "
                "fetch the checkpoint again"
            )
        return data


def _rows_of(place: Placement, data: Mapping[str, Tensor]) -> Tensor:
    """The part of its parameter where a tensor belongs."""
    whole = data[place.parameter]
    stacked = whole if place.expert is None else whole[place.expert]
    return stacked[place.start : place.start + place.shape[0]]


class RandomFiller(Filler):
    """Normal weights, norms of one, in floating point; the same on every start, and no two tensors
    alike."""

    def _tensors(self, placements: Placements) -> Iterator[tuple[str, Tensor]]:
        for name, place in placements.items():
            tensor = torch.empty(place.shape, dtype=self._dtype, device=self._device)
            if place.parameter.endswith("norm.weight"):
                yield name, tensor.fill_(1.0)
            else:
                seed = xxhash.xxh3_64_intdigest(name.encode())
                generator = torch.Generator(self._device).manual_seed(seed)
                yield name, tensor.normal_(0.0, DEVIATION, generator=generator)

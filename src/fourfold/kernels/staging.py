"""Small arrays that describe a step, on their way from the host to a device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 32  # words: kernels are compiled for pointers to multiples of 16 bytes

Ints = NDArray[np.int32]


class Staging:
    """Named int32 arrays on a device, replaced together by one copy.

    Every array lies at a place that only depends on the sizes, so a CUDA graph that was captured
    with some contents can be replayed with others: `load` them before the replay.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Room for arrays of these sizes in words; those that are rarely filled best come last."""
        self._places: dict[str, slice] = {}
        end = 0
        for name, words in sizes.items():
            self._places[name] = slice(end, end + words)
            end += -(-words // _ALIGNMENT) * _ALIGNMENT
        self._words = torch.zeros(end, dtype=torch.int32, device=device)

    def __getitem__(self, name: str) -> Tensor:
        """An array on the device, int32, flat."""
        return self._words[self._places[name]]

    def size(self, name: str) -> int:
        """Words that an array has room for."""
        place = self._places[name]
        return int(place.stop - place.start)

    def load(self, values: Mapping[str, Ints]) -> None:
        """Replaces the arrays: enqueues one copy on the current stream and does not wait.

        What was launched before on that stream still sees what was there before. An array shorter
        than its room leaves the rest undefined, and so do all that are not given.
        """
        used = max(self._places[name].start + array.size for name, array in values.items())
        # From PyTorch's cache of pinned memory, which does not give it out again before the copy.
        staged = torch.empty(used, dtype=torch.int32, pin_memory=self._words.is_cuda)
        words = staged.numpy()
        for name, array in values.items():
            place = self._places[name]
            assert array.size <= place.stop - place.start, f"{name} has no room for {array.size}"
            words[place.start : place.start + array.size] = array.ravel()
        self._words[:used].copy_(staged, non_blocking=True)


def padded(values: Ints, size: int, filler: int) -> Ints:
    """`values` [n], followed by as many fillers as make [size]."""
    whole = np.full(size, filler, np.int32)
    whole[: len(values)] = values
    return whole

"""How far the step under way on a GPU has come, told by the GPU while it computes.

Launching is not computing there, and the host hears of a step when it is over. So every few layers
a step writes its number to memory of the host: the pages of the layers before then hold what they
will hold at its end, and others may have them while later layers are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.borrowed import borrow
from fourfold.kernels.staging import Ints
from fourfold.quadrants.step import QuadrantStep

_LAYERS = 4
"""From one mark to the next. A mark is a kernel, about 2 us; a layer of as many rows as have marks
takes 100 us and more."""
_LEAST_ROWS = 512
"""Of prompts, for whose pages it is worth it."""

Reached = Callable[[], int]
"""Layers of a step, from the first on, in whose pages its prompts' rows are by now."""


class Progress:
    """The marks of the steps of one runner, which run one after the other."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._marks = [*range(_LAYERS, layers, _LAYERS), layers]
        host = torch.zeros(len(self._marks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._seen: Ints = host.numpy()
        self._told = borrow(host.data_ptr(), host.nbytes, device, host).view(torch.int32)
        self._number = np.zeros(1, np.int32)

    def begin(self, prefill_rows: int) -> Ints:
        """The next step's number [1], which the device is to know before the step begins. Steps
        that tell nothing have none, or marks could lag behind by more than numbers can tell."""
        if prefill_rows < _LEAST_ROWS:
            return np.zeros(1, np.int32)
        self._number = self._number + 1  # it wraps around, and so do differences
        return self._number

    def mark(self, step: QuadrantStep, number: Tensor, prefill_rows: int) -> None:
        """Has a step that is enqueued from now on tell how far it is; `number` is its own, int32
        [1] on the device. Steps of few rows tell nothing."""
        if prefill_rows < _LEAST_ROWS:
            return

        def stored(layer: int) -> None:
            if layer + 1 in self._marks:
                place = self._marks.index(layer + 1)
                torch.add(number, 0, out=self._told[place : place + 1])

        step.stored = stored

    def of(self, number: Ints, prefill_rows: int) -> Reached | None:
        """How far the step of a number is; None where it does not tell."""
        if prefill_rows < _LEAST_ROWS:
            return None

        def reached() -> int:
            # Later steps write the same memory.
            passed = int(np.count_nonzero(self._seen - number >= 0))
            return self._marks[passed - 1] if passed else 0

        return reached

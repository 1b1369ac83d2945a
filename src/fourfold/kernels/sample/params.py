"""How each row of a batch is sampled, packed so that all of it reaches a device in one copy.

A row's noise is one number in [0, 1), a hash of a key (made of the request's seed and the sample's
index) and the position: the same integers on every device, whatever else is in the batch.

Shapes: S rows, F int32 words of a row's record.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLDEST = 1e-4
"""A lower temperature means the argmax; dividing by it could overflow."""
WORDS = 12
"""Of a record: temperature, top-k, top-p, min-p's reach, the three penalties (repetition, presence,
frequency), slot, key (two words), position, flags."""
SLOT_WORD, POSITION_WORD = 7, 10
ADJUSTED, BIASED, REPORTED = 1, 2, 4
"""The flags."""

_RECORD = struct.Struct("<fifffffiqii")
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class SampleRow(NamedTuple):
    """One row: see `fourfold.kernels.sample.sample` for what the numbers do."""

    key: int
    """`noise_key` of the row's sample."""
    position: int
    """The drawn token's place in its sequence."""
    temperature: float = 1.0
    top_k: int = 0
    """0, or at least the vocabulary: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    slot: int = 0
    """Row of the `TokenTables`, and of the last tokens."""
    adjusted: bool = False
    """Whether the slot's tallies apply, as penalties, and its biases if `biased`."""
    biased: bool = False
    logprob: bool = True
    """Whether the drawn token's log-probability is wanted."""


@dataclasses.dataclass(frozen=True)
class SampleParams:
    """The rows of a batch as one int32 tensor [S, F] on their device."""

    packed_SF: Tensor

    @classmethod
    def pack(cls, rows: Iterable[SampleRow], device: torch.device) -> SampleParams:
        """Packs rows and copies them without waiting for the device."""
        packed_SF = torch.from_numpy(pack_rows(rows))
        if device.type == "cuda":
            packed_SF = packed_SF.pin_memory().to(device, non_blocking=True)
        return cls(packed_SF)

    @property
    def temperature(self) -> Tensor:
        """float32 [S]."""
        return self._floats(0)

    @property
    def top_k(self) -> Tensor:
        """int32 [S]."""
        return self.packed_SF[:, 1]

    @property
    def top_p(self) -> Tensor:
        """float32 [S]."""
        return self._floats(2)

    @property
    def reach(self) -> Tensor:
        """float32 [S]: how far below the largest logit min-p keeps tokens; inf where it is off."""
        return self._floats(3)

    @property
    def penalties(self) -> Tensor:
        """float32 [S, 3]: repetition, presence, frequency."""
        return self.packed_SF.view(torch.float32)[:, 4:7]

    @property
    def slot(self) -> Tensor:
        """int32 [S]."""
        return self.packed_SF[:, SLOT_WORD]

    @property
    def adjusted(self) -> Tensor:
        """bool [S]."""
        return (self.packed_SF[:, 11] & ADJUSTED) != 0

    @property
    def biased(self) -> Tensor:
        """bool [S]."""
        return (self.packed_SF[:, 11] & BIASED) != 0

    @property
    def reported(self) -> Tensor:
        """bool [S]: whose log-probability is wanted."""
        return (self.packed_SF[:, 11] & REPORTED) != 0

    @property
    def uniform(self) -> Tensor:
        """float64 [S]: each row's number in [0, 1)."""
        key_S = self.packed_SF.view(torch.int64)[:, 4]
        return uniform_numbers(key_S, self.packed_SF[:, POSITION_WORD])

    def _floats(self, word: int) -> Tensor:
        return self.packed_SF.view(torch.float32)[:, word]


def pack_rows(rows: Iterable[SampleRow]) -> NDArray[np.int32]:
    """Rows as records, int32 [S, F]."""
    packed = bytearray()
    for row in rows:
        # As a distance below the largest logit, rounded once, here: every device then keeps the
        # same tokens.
        reach = math.inf
        if row.min_p > 0:
            reach = max(row.temperature, COLDEST) * abs(math.log(row.min_p))
        packed += _RECORD.pack(
            row.temperature,
            row.top_k,
            row.top_p,
            reach,
            row.repetition_penalty,
            row.presence_penalty,
            row.frequency_penalty,
            row.slot,
            row.key,
            row.position,
            ADJUSTED * row.adjusted + BIASED * row.biased + REPORTED * row.logprob,
        )
    return np.frombuffer(packed, dtype=np.int32).reshape(-1, WORDS)


def noise_key(seed: int, index: int) -> int:
    """What a sample's noise is keyed by, in the range of int64."""
    return _signed(seed * _STEP + index * 0xD1B54A32D192ED03 + 1)


def uniform_numbers(key_N: Tensor, position_N: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [N], from int64 keys and int positions, as the kernels make them:
    splitmix64's finaliser, twice, over their sum."""
    x_N = key_N + position_N
    for _ in range(2):
        x_N = x_N + _signed(_STEP)
        for shift, factor in _MIXERS:
            x_N = (x_N ^ _shifted(x_N, shift)) * _signed(factor)
        x_N = x_N ^ _shifted(x_N, 31)
    return _shifted(x_N, 11).double() * 2.0**-53


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    return (x_N >> bits) & (_MASK >> bits)


def _signed(x: int) -> int:
    return ((x & _MASK) ^ (1 << 63)) - (1 << 63)

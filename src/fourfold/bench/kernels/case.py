"""What one measured case of a kernel is: the contract between the cases and the bench that times
them.

A file under `bench/kernels/cases/` offers `cases(device) -> Iterator[Case]`; every case is built,
checked, timed and dropped before the next is asked for, so that a file may yield large ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

Ceiling = Literal["copy bandwidth", "cuBLAS FP8", "cuBLAS INT8", "cuBLAS BF16"]
"""Measured by the bench on the same device in the same run: a device-to-device copy, bytes read
plus written; products of 8192 cubes of random data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a kernel on fixed inputs that hold random data, outliers included."""

    kernel: str
    """The verb, for instance `grouped_w4a8_gemm`."""
    case: str
    """Shape and setting, as a record's `case` names it."""
    run: Callable[[], object]
    """One call on the current stream, no host synchronisation; timed as the replay of a graph."""
    work: float
    """Operations (2 per multiply-add) or bytes that the case needs, the fewest possible."""
    unit: Literal["FLOP", "B"]
    ceiling: Ceiling
    error: Callable[[], float] | None = None
    """||out - reference|| / ||reference|| of a fresh call against the float reference."""
    baseline: Callable[[], object] | None = None
    """The best library's call that does the same work, timed in the same way."""
    baseline_name: str | None = None
    baseline_work: float | None = None
    """The baseline's work where it differs, so that rates are compared."""
    mark: float | None = None
    """What is to be reached, as a share of the baseline's rate, or of the ceiling where there is
    no baseline or `mark_of_ceiling`."""
    mark_of_ceiling: bool = False
    graph: bool = True
    """False where the call cannot be captured in a CUDA graph."""

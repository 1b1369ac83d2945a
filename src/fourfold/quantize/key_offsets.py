"""What all keys of a head have in common, for 8-bit pages to leave out.

Some channels of a key hardly change from token to token. Left in, they set the scale of a page and
cost the other channels precision; left out, every score of a query changes by the same amount,
which softmax does not notice. (Measured: docs/experiments-2026-11-24.md, with what balancing keys
against queries, as SmoothAttention does, would add to it: nothing.)

Shapes: T tokens, G KV heads, C head width.
"""

from __future__ import annotations

from torch import Tensor


class KeyMean:
    """The mean of rotated keys over a text, per KV head and channel, float32 on their device."""

    def __init__(self) -> None:
        self._total_GC: Tensor | None = None
        self._rows = 0

    def add(self, k_TGC: Tensor) -> None:
        """More keys of the same layer."""
        total_GC = k_TGC.float().sum(0)
        self._total_GC = total_GC if self._total_GC is None else self._total_GC + total_GC
        self._rows += k_TGC.shape[0]

    def mean(self) -> Tensor:
        """[G, C]; there must have been keys."""
        assert self._total_GC is not None
        return self._total_GC / self._rows

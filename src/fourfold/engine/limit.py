"""A limit that falls when it was too much for the memory, and finds its way back."""

from __future__ import annotations

_SOONEST, _LATEST = 32, 1 << 14
"""Steps that must fit before a limit rises: at first, and after many rises that went wrong."""


class Limit:
    """How much a step may hold, as far as steps that did not fit have shown; `most` at most.

    It rises by `rise` after so many steps that needed all of it and fitted. Where a rise went wrong
    it falls back to what had fitted, and the next one takes twice as many steps. Only where steps
    as large as the one that failed have fitted since, there must be more memory now, and that is
    forgotten.
    """

    def __init__(self, most: int, rise: int) -> None:
        self.value = most
        self.most = most
        self._rise = rise
        self._patience = _SOONEST
        self._fitted = self._largest = 0
        """Steps that needed all of it since it changed last, and the largest step since."""
        self._proven = 0
        """The limit before its last rise, until that is known to have been right or wrong."""
        self._failed = 0
        """What the last step that did not fit held, unless that is forgotten."""

    def fall(self, used: int, value: int) -> None:
        """A step that held `used` did not fit; the next is to hold `value`, which is less."""
        if 0 < self._proven < used:  # it was the rise that was too much
            self._patience = min(2 * self._patience, _LATEST)
            value = max(value, self._proven)
        self.value, self._failed = value, used
        self._proven = self._fitted = self._largest = 0

    def fitted(self, used: int) -> bool:
        """A step that held `used` fitted. True where all of `most` is allowed again."""
        if self.value == self.most and not (self._failed or self._proven):
            return False
        self._largest = max(self._largest, used)
        self._fitted += used + self._rise > self.value
        if self._fitted < self._patience:
            return False
        if self._largest >= self._failed:
            self._failed, self._patience = 0, _SOONEST
        self._fitted = self._largest = 0
        before, self.value = self.value, min(self.value + self._rise, self.most)
        self._proven = before if before < self.value else 0
        return before < self.value == self.most

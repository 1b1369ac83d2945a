"""Errors that mean a shortage of memory, after which a smaller step may still fit. Importing this
needs no torch."""

from __future__ import annotations

import errno

# A type of its own has only what PyTorch's GPU allocators raise. Graphs, libraries and pinned
# memory tell by a text, as those do too, and so does a CPU's allocator.
_TEXTS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "_status_alloc_failed",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that the device or the host is short of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return any(said in text for said in _TEXTS)
    return isinstance(error, MemoryError)

"""Kernels run in Triton's interpreter here; `tests/cpu/conftest.py` asks for it."""

from __future__ import annotations

from typing import Any

import pytest


def _mend_loops_over_runtime_bounds() -> None:
    """Triton 3.6 turns a one-element array into an index in a way that NumPy 2.4 refuses."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


_mend_loops_over_runtime_bounds()

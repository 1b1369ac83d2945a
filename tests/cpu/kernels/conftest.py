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


def _patch_once_a_launch() -> None:
    """Triton 3.6 goes over its whole language for each call of a function within a kernel, though
    the kernel's launch has replaced everything: a third of the time of all tests here."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, language = interpreter._patch_lang, interpreter.tl

    def patched(function: Any) -> Any:
        seen = [m for m in function.__globals__.values() if m is language or m is language.core]
        if not any(language.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patched


_mend_loops_over_runtime_bounds()
_patch_once_a_launch()

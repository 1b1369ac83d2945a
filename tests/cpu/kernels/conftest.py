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


def _describe_only_what_is_asked() -> None:
    """Triton 3.6 spells out the type of every shape, the name of every block and a table of NumPy's
    types in each operation, though hardly any is looked at: a third of the time that was left."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not pytest.importorskip("triton").__version__.startswith("3.6."):
        return
    core, numpy_type = interpreter.tl.core, interpreter._get_np_dtype

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        known = type is None or isinstance(type, core.tuple_type)
        self._type = type if known else core.tuple_type(type)

    def type_of_tuple(self: Any) -> Any:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    shapes: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def shape_of(sizes: Any) -> tuple[Any, ...]:
        """A block's shape, and it and its number of elements as a tensor has them."""
        key = tuple([s.value if isinstance(s, core.constexpr) else s for s in sizes])
        if key not in shapes:
            if not key:
                raise TypeError("0d block_type is forbidden")
            count = core.validate_block_shape(key)
            known = core.tuple([core.constexpr(size) for size in key])
            shapes[key] = core.tuple(key), count, known, core.constexpr(count)
        return shapes[key]

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, *_ = shape_of(shape)

    none = core.tuple(()), core.constexpr(1)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(type.shape)[2:] if type.is_block() else none

    by_element: dict[str, Any] = {}

    def numpy_type_of(asked: Any) -> Any:
        element = asked.scalar
        if element.name not in by_element:
            by_element[element.name] = numpy_type(element)
        return by_element[element.name]

    core.tuple.__init__ = make_tuple
    core.tuple.type = property(type_of_tuple, lambda self, type: setattr(self, "_type", type))
    core.block_type.__init__ = make_block
    core.tensor.__init__ = make_tensor
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    interpreter._get_np_dtype = numpy_type_of


_mend_loops_over_runtime_bounds()
_patch_once_a_launch()
_describe_only_what_is_asked()

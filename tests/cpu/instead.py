"""Modules of which one importer alone sees other contents."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class Instead:
    """Stands in a module's place where one of ours has imported it, with some names replaced.

    What is replaced in the module itself is replaced for every thread of the process: also for
    the servers and engines that other tests' fixtures keep.
    """

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

"""Text that every Python brings along, for who gives none: to calibrate on, and to be tested on.

They are different texts. Calibration reads what the standard library's modules, classes and
functions say about themselves (180 thousand tokens, or so); the test reads the language reference.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fourfold.errors import ConfigError

_SHORTEST = 200


def calibration_text() -> str:
    """The longer docstrings of the modules of Python's standard library that are one file."""
    return "\n\n".join(_docstrings(Path(sysconfig.get_path("stdlib"))))


def held_out_text() -> str:
    """Python's language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut(ids: Sequence[int], windows: int, length: int, what: str) -> Tensor:
    """Windows [N, L] of a text's tokens, evenly spread over it; fewer where it is too short for
    all of them. `ConfigError` where it is too short for one."""
    count = min(windows, len(ids) // length)
    if count == 0:
        raise ConfigError(
            f"{what} has {len(ids)} tokens, which is less than one window of {length}; "
            "give a longer text"
        )
    stride = len(ids) // count
    return torch.tensor([ids[i * stride : i * stride + length] for i in range(count)])


def _docstrings(root: Path) -> Iterator[str]:
    for file in sorted(root.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > _SHORTEST:
                    yield text

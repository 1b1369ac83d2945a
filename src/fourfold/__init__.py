"""Fourfold: serves sparse Mixture-of-Experts language models, and trains the ones it serves.

`from fourfold import LLM` embeds one in a program; importing this alone loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourfold.llm import LLM as LLM

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from fourfold.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

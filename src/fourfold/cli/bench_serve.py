"""`fourfold bench serve`: load an OpenAI-compatible server and measure it."""

from __future__ import annotations

from fourfold.bench.serve.config import ServeBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.serve.main import main

    return main(options)

"""`fourfold bench quality`: what a precision costs in perplexity and agreement on a text."""

from __future__ import annotations

from fourfold.bench.quality.config import QualityBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.quality.main import main

    return main(options)

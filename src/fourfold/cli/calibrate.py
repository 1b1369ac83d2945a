"""`fourfold calibrate`: what work costs on this GPU, measured and fitted."""

from __future__ import annotations

from fourfold.bench.calibrate.config import CalibrateConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.calibrate.main import main

    return main(options)

"""`fourfold train plot`: figures of runs, from their metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draws loss, held-out loss, gradient norm, speed and expert loads of runs over each other, by
    steps and by tokens."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The `run.folder` of each; a run may still be under way."""
    out: Path
    """The folder for the figures."""
    form: str = "svg"
    """The figures' format: svg, png or pdf."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("name the folder of at least one run")
        if self.form not in ("svg", "png", "pdf"):
            raise ConfigError(f"--form {self.form}: take svg, png or pdf")


def run(options: Options) -> int:
    from fourfold.train.plots import draw

    try:
        paths = draw(options.runs, options.out, options.form)
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written ({error}); set --out") from error
    for path in paths:
        print(path)
    return 0

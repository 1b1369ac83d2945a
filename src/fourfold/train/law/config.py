"""The options of `fourfold law`. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Trains every model of a grid that has no record yet; run it again to resume."""

    grid: Annotated[Path, tyro.conf.Positional]
    """A TOML file: `base` (a configuration of `fourfold train`), `out`, `tokens`, `ratios` (of
    experts to those a token takes), `seeds`, and a [[model]] for each size with its `name` and the
    fields that it `set`s. docs/training.md has an example."""
    only: str = ""
    """Train only those whose name holds this."""
    list: bool = False
    """Show the grid and what is done, and train nothing."""
    workers: int | None = None
    """Models that are trained at the same time, each by a process on one GPU. Default: as many as
    there are GPUs; one without any, and one where the grid has a `command`, which may use all."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fits the law to the records of a sweep."""

    records: Annotated[Path, tyro.conf.Positional]
    """The folder of records: `OUT/records` of a sweep."""
    out: Path | None = None
    """Where the fit goes, for `fourfold law plot` and `advise`. Default: fit.json beside the
    folder of records, unless there is one; named here, it is replaced."""
    starts: int = 512
    """How many places the search for the best coefficients begins from."""
    resamplings: int = 1000
    """How often the fit is repeated on records drawn anew, for the intervals."""
    seed: int = 0
    """Seeds the beginnings of the search and the drawing of records."""
    least_tokens: float = 0.0
    """Leaves out runs on fewer tokens: what took too few steps follows no power law."""

    def __post_init__(self) -> None:
        if not 0 <= self.least_tokens < float("inf"):
            raise ConfigError(f"--least-tokens {self.least_tokens:g} is no number of tokens")
        if self.starts < 1 or self.resamplings < 1:
            raise ConfigError("--starts and --resamplings must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draws the law: losses, leverage, the fitted surface and residuals."""

    fit: Annotated[Path, tyro.conf.Positional]
    """What `fourfold law fit` wrote."""
    records: Path | None = None
    """The folder of records. Default: `records` beside the fit."""
    out: Path | None = None
    """The folder for the figures. Default: `plots` beside the fit."""
    form: str = "svg"
    """The figures' format: svg, png or pdf."""

    def __post_init__(self) -> None:
        if self.form not in ("svg", "png", "pdf"):
            raise ConfigError(f"--form {self.form}: take svg, png or pdf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Says which sparsity has the least loss within budgets, of those given."""

    fit: Annotated[Path, tyro.conf.Positional]
    """What `fourfold law fit` wrote."""
    flops: float
    """FLOPs that training may take."""
    records: Path | None = None
    """The folder of records. Default: `records` beside the fit."""
    memory_gib: float | None = None
    """Memory that the served weights may take, in GiB, embedding and head not counted. Default: no
    limit."""
    weight_bits: float = 4.25
    """Bits that a served weight takes, its share of scales included."""
    step_ms: float | None = None
    """Milliseconds that decoding one token of each sequence may take; the head, and attention's
    reading of keys and values, which all models of a size share, are not counted. Default: no
    limit."""
    batch: int = 32
    """Sequences that are decoded together."""
    hardware: str = "NVIDIA H100 80GB HBM3"
    """The GPU that serves, as PyTorch names it; its calibration prices a step."""
    bandwidth: float | None = None
    """Bytes per second of its memory, where it was not calibrated: the nearest GPU's calibration is
    scaled to it."""

    def __post_init__(self) -> None:
        given = {
            "--flops": self.flops,
            "--memory-gib": self.memory_gib,
            "--weight-bits": self.weight_bits,
            "--step-ms": self.step_ms,
            "--batch": self.batch,
            "--bandwidth": self.bandwidth,
        }
        for name, value in given.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} {value} must be above 0, and finite")

"""Which models a sweep trains, read from a TOML file:

    base = "base.toml"                   # a configuration of `fourfold train`, beside this file
    out = "runs"                         # takes the runs and OUT/records
    tokens = [50_000_000, 200_000_000]   # that each model is trained on
    ratios = [1, 4, 8, 16, 32]           # experts for each that a token chooses; 1: dense
    seeds = [0]

    [[model]]
    name = "8M"
    set = { "model.layers" = 8, "model.width" = 256, "optimizer.rate" = 2e-3 }

A model may have `tokens`, `ratios` and `seeds` of its own. `[sparse]` and `[dense]` hold fields for
all runs of a kind, `command` the words before the arguments of `fourfold train` where each run is
to be trained by several processes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from fourfold.errors import ConfigError, FourfoldError
from fourfold.train.config import TrainConfig, read_config

_NAME = re.compile(r"[A-Za-z0-9._-]+")
Value = str | int | float | bool
Fields = dict[str, Value]
_OWN = (
    *("model.form", "model.experts", "schedule.steps", "run.seed", "run.folder", "run.export"),
    *("run.start_from", "run.evaluate_every"),
)
"""Fields that follow from a run's place in the grid."""


class RunFailedError(FourfoldError):
    """A run that came to no end; the sweep can go on with others."""


class SizeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model size. `set` has fields of `fourfold train` by section.field; those it leaves out are
    the base's."""

    name: str
    set: Fields
    ratios: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None


class GridFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file as it is written."""

    base: str
    out: str
    tokens: tuple[int, ...]
    ratios: tuple[int, ...]
    model: tuple[SizeSection, ...]
    seeds: tuple[int, ...] = (0,)
    sparse: Fields = {}
    dense: Fields = {}
    command: tuple[str, ...] = ()
    timeout: float = 86400.0
    """Seconds that a run may take in a process of its own."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of models that have their records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `fourfold train`: a run of the grid, or a stretch of the stable phase that runs
    share."""

    name: str
    overrides: tuple[str, ...]
    """For `--set`."""
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def checkpoint(self) -> Path:
        """What it leaves at its end."""
        return self.folder / "checkpoints" / f"step-{self.config.schedule.steps:08d}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Run):
    """A run of the grid."""

    chain: str
    model: str
    ratio: int
    seed: int
    tokens: int
    """That were asked for: what is predicted is less by the first token of each document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """The runs of one model, ratio and seed, shortest first.

    A warm-up and stable phase does not know when it ends, so it is trained once: `stretches[i]`
    goes from where the decay of the run before begins to where that of `cells[i]` does, and
    `cells[i]` goes on from there. That gives what each run would give by itself.
    """

    name: str
    cells: tuple[Cell, ...]
    stretches: tuple[Run, ...]
    """Empty where there is one run only, which then is trained by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A sweep."""

    base: Path
    records: Path
    chains: tuple[Chain, ...]
    command: tuple[str, ...]
    timeout: float
    keep_checkpoints: bool

    @property
    def logs(self) -> Path:
        """Takes what the processes say that train runs at the same time."""
        return self.records.parent / "logs"

    @property
    def cells(self) -> list[Cell]:
        return [cell for chain in self.chains for cell in chain.cells]

    def record(self, cell: Cell) -> Path:
        """Where a run's record is, once it is finished."""
        return self.records / f"{cell.name}.json"


def read_grid(path: Path) -> Grid:
    """Reads a grid and checks every run of it. ConfigError with the remedy."""
    try:
        file = msgspec.convert(tomllib.loads(path.read_text()), GridFile)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a grid: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{path}: {error}; a grid has {', '.join(GridFile.__struct_fields__)}, and each "
            f"[[model]] has {', '.join(SizeSection.__struct_fields__)}"
        ) from error
    base, out = path.parent / file.base, path.parent / file.out
    names = [size.name for size in file.model]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"{path}: give each [[model]] a name of its own, and at least one")
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise ConfigError(
            f"{path}: a model's name {wrong[0]!r} cannot be a file's; use letters, digits, '.', "
            "'_' and '-'"
        )
    sections: list[GridFile | SizeSection] = [file, *file.model]
    for section in sections:
        _check_axes(path, section)
    for given in (file.sparse, file.dense, *(size.set for size in file.model)):
        if own := [name for name in _OWN if name in given]:
            raise ConfigError(
                f"{path}: {own[0]} = {given[own[0]]!r}: the sweep sets that for each run; leave it "
                "out"
            )
    chains = [
        _chain(file, base, out, size, ratio, seed)
        for size in file.model
        for ratio in size.ratios or file.ratios
        for seed in size.seeds or file.seeds
    ]
    if chains[0].cells[0].config.data.held_out is None:
        raise ConfigError(f"{base}: a law is fitted to held-out losses; set data.held_out")
    for chain in chains:
        _check_same_text(chains[0].cells[0], chain.cells[0])
    return Grid(
        base=base,
        records=out / "records",
        chains=tuple(chains),
        command=file.command,
        timeout=file.timeout,
        keep_checkpoints=file.keep_checkpoints,
    )


def _check_axes(path: Path, section: GridFile | SizeSection) -> None:
    """ConfigError for runs that would be trained twice, into one folder."""
    for axis in ("tokens", "ratios", "seeds"):
        values = getattr(section, axis)
        if values is not None and len(set(values)) < max(1, len(values)):
            raise ConfigError(
                f"{path}: {axis} = {list(values)}: give at least one, and none of them twice"
            )


def _check_same_text(first: Cell, other: Cell) -> None:
    """ConfigError for runs that would be evaluated on different texts."""
    ours, theirs = first.config.data, other.config.data
    for name in ("held_out", "length", "seed"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"data.{name} of {other.name} is another than of {first.name}, so they would be "
                "evaluated on different texts; give all models the same"
            )
    batches = first.config.run.evaluate_batches, other.config.run.evaluate_batches
    if batches[0] * ours.rows != batches[1] * theirs.rows:
        raise ConfigError(
            f"{other.name} would be evaluated on {batches[1]} * {theirs.rows} rows, and "
            f"{first.name} on {batches[0]} * {ours.rows}; set run.evaluate_batches so that both "
            "read as many"
        )


def _chain(
    file: GridFile, base: Path, out: Path, size: SizeSection, ratio: int, seed: int
) -> Chain:
    if ratio < 1:
        raise ConfigError(f"ratio {ratio}: a model has at least the experts that are chosen")
    name = f"{size.name}-x{ratio}-s{seed}"
    kind = file.dense if ratio == 1 else file.sparse
    fields: Fields = {**kind, **size.set, "run.seed": seed, "run.export": False}
    fields["model.form"] = "dense" if ratio == 1 else "sparse"
    chosen = read_config(base, _overrides(fields)).model.experts_per_token
    fields["model.experts"] = ratio * chosen
    tokens = sorted(size.tokens or file.tokens)
    cells: list[Cell] = []
    stretches: list[Run] = []
    for count in tokens:
        cell = _cell(base, out, fields, size.name, ratio, seed, count)
        schedule = cell.config.schedule
        router = cell.config.router
        biased = ratio > 1 and router.score == "sigmoid"
        if biased and len(tokens) > 1 and router.bias_frozen > schedule.decay:
            raise ConfigError(
                f"router.bias_frozen = {router.bias_frozen:g} is more than schedule.decay = "
                f"{schedule.decay:g}: runs of several `tokens` share their stable phase, in which "
                "biases move; lower the former"
            )
        stable = schedule.steps - round(schedule.decay * schedule.steps)
        if cells and schedule.steps == cells[-1].config.schedule.steps:
            raise ConfigError(
                f"{cell.name} and {cells[-1].name} take as many steps; give tokens that differ by "
                "a step"
            )
        if len(tokens) > 1:
            before = stretches[-1] if stretches else None
            stretches.append(_stretch(base, out, fields, name, stable, before))
            start: Fields = {"run.start_from": str(stretches[-1].checkpoint)}
            cell = _cell(base, out, fields | start, size.name, ratio, seed, count)
        cells.append(cell)
    return Chain(name=name, cells=tuple(cells), stretches=tuple(stretches))


def _cell(
    base: Path, out: Path, fields: Fields, model: str, ratio: int, seed: int, tokens: int
) -> Cell:
    name = f"{model}-x{ratio}-{_short(tokens)}-s{seed}"
    data = read_config(base, _overrides(fields)).data
    steps = max(1, round(tokens / (data.rows * data.length)))
    own: Fields = {"schedule.steps": steps, "run.folder": str(out / name)}
    own |= {"run.evaluate_every": steps}
    overrides = _overrides(fields | own)
    return Cell(
        name=name,
        chain=f"{model}-x{ratio}-s{seed}",
        model=model,
        ratio=ratio,
        seed=seed,
        tokens=tokens,
        overrides=overrides,
        config=read_config(base, overrides),
    )


def _stretch(
    base: Path, out: Path, fields: Fields, chain: str, steps: int, before: Run | None
) -> Run:
    """The stable phase up to `steps`. Selection biases move all the time: that they rest at a run's
    end is its decay's affair."""
    name = f"{chain}-stable-{steps}"
    own: Fields = {"schedule.steps": steps, "schedule.decay": 0.0, "router.bias_frozen": 0.0}
    own |= {"run.folder": str(out / name), "run.evaluate_every": steps}
    if before is not None:
        own["run.start_from"] = str(before.checkpoint)
    overrides = _overrides(fields | own)
    return Run(name=name, overrides=overrides, config=read_config(base, overrides))


def _overrides(fields: Mapping[str, Value]) -> tuple[str, ...]:
    """For `--set`, values as TOML has them: JSON's numbers, words and truths are TOML's too."""
    return tuple(f"{name}={json.dumps(value)}" for name, value in fields.items())


def _short(tokens: int) -> str:
    """50_000_000 is 50M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def arguments(grid: Grid, run: Run) -> Sequence[str]:
    """Of `fourfold train`."""
    return [str(grid.base), "--set", *run.overrides]

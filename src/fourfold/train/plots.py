"""Figures of training runs, from their metrics: several runs lie over each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from fourfold.errors import ConfigError
from fourfold.train.figures import write_figures
from fourfold.train.metrics import EvaluationRecord, Record, StepRecord, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = 10
"""Of matplotlib's cycle; more runs get a range of colours."""
_LABELS = {"step": "steps", "tokens": "tokens that were predicted"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run told."""

    name: str
    steps: list[StepRecord]
    evaluations: list[EvaluationRecord]


def draw(folders: Sequence[Path], out: Path, ending: str) -> list[Path]:
    """Draws runs over steps and over tokens; returns the files.

    Args:
        folders: each `run.folder` of a run.
        out: the folder to write.
        ending: svg, png or pdf.

    Raises:
        ConfigError: for a folder without metrics, one that is named twice, or without matplotlib.
        OSError: where `out` cannot be written.
    """
    return write_figures(_figures(_read(folders)), out, ending)


def _read(folders: Sequence[Path]) -> list[Run]:
    places = [folder.resolve() for folder in folders]
    runs = []
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise ConfigError(f"{folder} is named twice; name each run once")
        alone = [other.name for other in places].count(place.name) == 1
        steps: list[StepRecord] = []
        evaluations: list[EvaluationRecord] = []
        for record in _records(folder):
            if isinstance(record, StepRecord):
                steps.append(record)
            else:
                evaluations.append(record)
        runs.append(Run(place.name if alone else str(folder), steps, evaluations))
    return runs


def _records(folder: Path) -> list[Record]:
    path = folder / "metrics.jsonl"
    try:
        records = read_records(path)
    except (OSError, msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as metrics of a run ({error})") from error
    if not records:
        raise ConfigError(
            f"{path} has no metrics; name the run.folder of a run that took some steps"
        )
    return records


def _figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    for place in ("step", "tokens"):
        yield f"by-{place}", _figure(runs, place)


def _figure(runs: Sequence[Run], place: str) -> Figure:
    """`place`: the field of records that they lie over."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 6.5))
    *panels, legend = figure.subplots(2, 3).flat
    loss, held_out, norm, speed, load = panels
    for number, run in enumerate(runs):
        colour = colormaps["turbo"](number / len(runs)) if len(runs) > _COLOURS else f"C{number}"
        spikes = [record for record in run.steps if record.spike]
        for axes, records, field, style in (
            (loss, run.steps, "loss", "-"),
            (loss, spikes, "loss", "x"),
            (held_out, run.evaluations, "held_out_loss", ".-"),
            (norm, run.steps, "gradient_norm", "-"),
            (speed, run.steps, "tokens_per_second", "-"),
            (load, run.steps, "load_most", "-"),
            (load, run.steps, "load_least", "--"),
        ):
            _line(axes, records, place, field, style, colour)
        legend.plot([], [], label=run.name, color=colour)
    loss.set(title="loss, nats a token (x: spike)")
    held_out.set(title="held-out loss, nats a token")
    norm.set(title="norm of the gradients, before clipping")
    speed.set(title="tokens/s", ylim=(0, None))
    load.set(title="largest and least (dashed) load of an expert\nover the mean of its layer")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    last = max(getattr(each, place) for run in runs for each in (*run.steps, *run.evaluations))
    for axes in panels:
        axes.set(xlabel=_LABELS[place], xlim=(0, 1.03 * last))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if not axes.lines:
            axes.text(0.5, 0.5, "not in these runs", transform=axes.transAxes, ha="center")
    legend.axis("off")
    legend.legend(loc="upper left")
    figure.tight_layout()
    return figure


def _line(
    axes: Axes, records: Sequence[Record], place: str, field: str, style: str, colour: Any
) -> None:
    """Draws a field of the records that have it."""
    known = [record for record in records if getattr(record, field) is not UNSET]
    if known:
        # A run whose only record this is shows as a dot.
        style = "." if len(known) == 1 and style != "x" else style
        places = [getattr(record, place) for record in known]
        values = [getattr(record, field) for record in known]
        axes.plot(places, values, style, color=colour, lw=1)

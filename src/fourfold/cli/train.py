"""`fourfold train`: a sparse or dense decoder from shards of tokens to a directory that is served.

On several devices: `torchrun --nproc-per-node N --no-python fourfold train CONFIG`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import tyro
from msgspec import UnsetType

from fourfold.errors import ConfigError
from fourfold.train.config import TrainConfig, read_config

if TYPE_CHECKING:
    from fourfold.train.data.batches import ShardBatches
    from fourfold.train.data.shards import Vocabulary
    from fourfold.train.loop import Trainer
    from fourfold.train.metrics import Record
    from fourfold.train.reporting import Watch

_ASKED = "ending with a checkpoint once the step is done; a second signal ends at once\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains a model, or goes on with a run that was interrupted. SIGTERM and Ctrl-C leave a
    checkpoint to go on from."""

    config: Annotated[Path, tyro.conf.Positional]
    """A TOML file with the sections [model], [data], [schedule] and [run], and where their defaults
    do not suit also [router], [optimizer] and [parallel]; docs/training.md has an example."""
    set: tuple[str, ...] = ()
    """Fields that differ from the file, as section.field=value."""


def run(options: Options) -> int:
    config = read_config(options.config, options.set)
    from safetensors import SafetensorError

    from fourfold.models.loading import resolve_device
    from fourfold.train.data.batches import ReadAhead, ShardBatches
    from fourfold.train.data.shards import Shards
    from fourfold.train.loop import Trainer
    from fourfold.train.model import model_config
    from fourfold.train.parallel import joined
    from fourfold.train.stopping import asked_by_signals

    data = config.data
    device = resolve_device(config.run.device)
    shards = Shards(data.train)
    vocabulary = shards.meta.vocabulary
    model = model_config(config.model, config.router, vocabulary.tokens, vocabulary.end_of_text)
    config, held_out = _held_out(config, vocabulary)
    batches = ShardBatches(shards, rows=data.rows, length=data.length, seed=data.seed)
    folder = Path(config.run.folder)
    with joined(config.parallel, device) as parallel, ReadAhead(batches) as ahead:
        trainer = Trainer(config, model, ahead, parallel, contents=shards.contents())
        shown = parallel.rank == 0
        tell = _teller(shown=shown)
        for line in _summary(trainer, config, shards.meta.tokens):
            tell(line)
        try:
            said = _ASKED if shown else ""
            with _bar(trainer, config, shown=shown) as watch, asked_by_signals(said) as asked:
                stopped = trainer.run(held_out=held_out, watch=watch, asked=asked)
            if stopped:
                steps = f"step {trainer.steps:,} of {config.schedule.steps:,}"
                tell(f"stopped at {steps}, with a checkpoint; the same command goes on from it")
                raise KeyboardInterrupt
            if config.run.export:
                # Beside the shards, where `fourfold tokenize` puts it; a grammar has none.
                tokenizer = Path(data.train).parent / "tokenizer"
                given = tokenizer if tokenizer.is_dir() else None
                trainer.export(folder / "model", given)
                tell(f"model: {folder / 'model'}" + ("" if given else ", without a tokenizer"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{folder} cannot be written ({error}); set run.folder, or make room"
            ) from error
    return 0


def _teller(*, shown: bool) -> Callable[[str], None]:
    """Prints a line to stderr, in the process that prints."""

    def tell(line: str) -> None:
        if shown:
            print(line, file=sys.stderr, flush=True)

    return tell


def _summary(trainer: Trainer, config: TrainConfig, available: int) -> Iterator[str]:
    """What is trained, and on how much of the tokens that are available."""
    from fourfold.train.model import count

    model, data, run = trainer.model.config, config.data, config.run
    counts = count(model, data.length)
    dtype = str(trainer.dtype).removeprefix("torch.")
    yield (
        f"{model.family}: {counts.total:,} parameters, {counts.active:,} of them active "
        f"({counts.active_non_embedding:,} without embedding and head); "
        f"{counts.flops_per_token:.3g} FLOPs a token, in {dtype}"
    )
    steps, step = config.schedule.steps, data.rows * data.length
    begun = f", from step {trainer.steps}" if trainer.steps else ""
    yield (
        f"{run.folder}: {steps:,} steps of {step:,} tokens{begun}; {steps * step:,} tokens are "
        f"{steps * step / available:.3g} epochs of {data.train}"
    )


def _held_out(
    config: TrainConfig, vocabulary: Vocabulary
) -> tuple[TrainConfig, ShardBatches | None]:
    """What is evaluated on, and the configuration with no more of it than there is: read again,
    text would count twice."""
    from fourfold.train.data.batches import ShardBatches
    from fourfold.train.data.shards import Shards

    data = config.data
    if data.held_out is None:
        return config, None
    shards, batch = Shards(data.held_out), data.rows * data.length
    if shards.meta.vocabulary.sha256 != vocabulary.sha256:
        raise ConfigError(
            f"data.held_out = {data.held_out} was tokenised with another vocabulary than "
            f"{data.train}; tokenise both with one"
        )
    if shards.meta.tokens <= batch:
        raise ConfigError(
            f"data.held_out = {data.held_out} has {shards.meta.tokens:,} tokens, less than one "
            f"batch of data.rows = {data.rows} of data.length = {data.length}; hold out more with "
            "`fourfold tokenize --held-out`, or lower data.rows"
        )
    held_out = ShardBatches(shards, rows=data.rows, length=data.length, seed=data.seed)
    batches = min(config.run.evaluate_batches, held_out.batches_of_epoch)
    run = msgspec.structs.replace(config.run, evaluate_batches=batches)
    return msgspec.structs.replace(config, run=run), held_out


@contextlib.contextmanager
def _bar(trainer: Trainer, config: TrainConfig, *, shown: bool) -> Iterator[Watch]:
    """A progress bar on stderr with what the last record says, and above it lines for what went
    wrong; in a log, a line for each record."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from fourfold.train.metrics import StepRecord

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), MofNCompleteColumn(), Remaining()
    shown = shown and console.is_interactive
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("training", total=config.schedule.steps, completed=trainer.steps)

        dead = 0

        def watch(record: Record) -> None:
            nonlocal dead
            line, stays = _line(record), True
            if shown and isinstance(record, StepRecord):
                bar.update(task, completed=record.step, description=line)
                found = dead if isinstance(record.dead_experts, UnsetType) else record.dead_experts
                # Experts stay dead for long: a line where there are others than before.
                stays, dead = record.spike or 0 < found != dead, found
            if stays:
                console.print(f"step {record.step}  {line}", markup=False, highlight=False)

        yield watch


def _line(record: Record) -> str:
    from fourfold.train.metrics import EvaluationRecord

    if isinstance(record, EvaluationRecord):
        return f"held-out loss {record.held_out_loss:.4f}"
    line = f"loss {record.loss:.4f}  {record.tokens_per_second:,.0f} tok/s"
    if record.mfu:
        line += f"  MFU {record.mfu:.1%}"
    if record.load_most:
        line += f"  load {record.load_least:.2f}-{record.load_most:.2f}"
    if record.dead_experts:
        line += f"  {record.dead_experts} experts dead"
    return line + ("  spike" if record.spike else "")

"""Trains what a grid says and has no record yet: the runs of a chain one after the other, chains at
the same time where there are several that train.

A run has its record once it is finished, written last and whole, so a sweep that was killed
goes on where it was: `fourfold train` continues the run it was in. A run that fails has no record;
the sweep goes on with those that do not need it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import platform
import shutil
import statistics
from collections.abc import Callable, Sequence

import msgspec
import torch
from msgspec import UNSET, UnsetType

from fourfold import __version__
from fourfold.errors import ConfigError
from fourfold.models.loading import resolve_device
from fourfold.train.data.shards import Shards
from fourfold.train.law.grid import Cell, Chain, Grid, Run, RunFailedError, arguments
from fourfold.train.law.records import RunRecord, read_record, write_record
from fourfold.train.metrics import EvaluationRecord, StepRecord, read_records
from fourfold.train.model import Counts, count, model_config

Launch = Callable[[Run], None]
"""Trains a run to its end. RunFailedError where that cannot be."""
Tell = Callable[[str], None]
_WARM_UP_RECORDS = 1
_CONFIG = "config.sha256"
"""In a run's folder: what it is of."""
_SAME_RESULT = {
    *("run.folder", "run.start_from", "run.save_every", "run.keep", "run.evaluate_every"),
    *("run.log_every", "run.tensorboard", "run.export", "run.cuda_graph", "parallel.timeout"),
}
"""Fields that change nothing of the held-out loss at a run's end."""


def is_done(grid: Grid, cell: Cell) -> bool:
    """Whether a run has its record. ConfigError where that is of another configuration."""
    path = grid.record(cell)
    if not path.exists():
        return False
    if read_record(path).config_sha256 != _fingerprint(cell):
        raise ConfigError(
            f"{path} is of a run with another configuration; delete it and {cell.folder} to train "
            "that again, or name another `out`"
        )
    return True


def sweep(grid: Grid, launches: Sequence[Launch], tell: Tell, *, only: str = "") -> dict[str, str]:
    """Trains the runs whose name holds `only`; returns those without a record, and why. As many
    chains are trained at the same time as there are `launches`. ConfigError for what would let
    every run fail: shards or a device that are not there, a command that cannot be started."""
    wanted = {cell.name for cell in grid.cells if only in cell.name and not is_done(grid, cell)}
    chains = [chain for chain in grid.chains if wanted & {cell.name for cell in chain.cells}]
    for chain in chains:
        for run in (*chain.stretches, *chain.cells):
            _check_folder(run)
    _check_shared([chain.cells[0] for chain in chains])
    if len(launches) > 1:
        # Else one may still be at work on the longest when all others have nothing left to do.
        chains.sort(key=_flops, reverse=True)
    waiting = collections.deque(chains)
    missing: dict[str, str] = {}

    def work(launch: Launch) -> None:
        while waiting:
            try:
                chain = waiting.popleft()
            except IndexError:  # another one took it
                return
            missing.update(_train_chain(grid, chain, wanted, launch, tell))

    if len(launches) == 1:
        work(launches[0])
        return missing
    pool = concurrent.futures.ThreadPoolExecutor(len(launches))
    try:
        for each in concurrent.futures.as_completed([pool.submit(work, own) for own in launches]):
            each.result()
    finally:
        # After an error nothing more is begun; what was is left to whoever made the launches.
        waiting.clear()
        pool.shutdown(wait=False)
    return missing


def _train_chain(
    grid: Grid, chain: Chain, wanted: set[str], launch: Launch, tell: Tell
) -> dict[str, str]:
    """Trains the wanted runs of a chain; returns those that are missing, and why."""
    missing: dict[str, str] = {}
    for number, cell in enumerate(chain.cells):
        if cell.name not in wanted:
            continue
        try:
            if chain.stretches:
                _train_stretch(chain, number, launch, tell)
            _train(cell, launch, tell)
            record = record_of(grid, cell)
        except RunFailedError as error:
            missing[cell.name] = str(error)
            tell(f"{cell.name} is missing: {error}")
            continue
        write_record(record, grid.record(cell))
        tell(f"{cell.name}: held-out loss {record.loss:.4f}")
        if not grid.keep_checkpoints:
            _forget(cell)
    if not grid.keep_checkpoints and all(is_done(grid, cell) for cell in chain.cells):
        for run in (*chain.cells, *chain.stretches):
            _forget(run)
    return missing


def _forget(run: Run) -> None:
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def _flops(chain: Chain) -> float:
    """About what a chain costs: its longest run."""
    last = chain.cells[-1]
    return _counts(last).flops_per_token * last.tokens


def _train_stretch(chain: Chain, number: int, launch: Launch, tell: Tell) -> None:
    """The stable phase up to where a run begins its decay, and what it needs itself."""
    stretch = chain.stretches[number]
    if stretch.checkpoint.is_dir():
        return
    if number:
        _train_stretch(chain, number - 1, launch, tell)
    _train(stretch, launch, tell)


def _train(run: Run, launch: Launch, tell: Tell) -> None:
    tell(f"training {run.name}")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / _CONFIG).write_text(_fingerprint(run))
    launch(run)


def _check_folder(run: Run) -> None:
    """ConfigError for a run that would go on from what another configuration left."""
    path = run.folder / _CONFIG
    if path.exists() and path.read_text() != _fingerprint(run):
        raise ConfigError(
            f"{run.folder} is of a run with another configuration; delete it, or name another `out`"
        )


def _check_shared(cells: Sequence[Cell]) -> None:
    """ConfigError for what is no fault of one run."""
    for train, held_out in {(cell.config.data.train, cell.config.data.held_out) for cell in cells}:
        assert held_out is not None
        seen, unseen = Shards(train).meta, Shards(held_out).meta
        if seen.vocabulary.sha256 != unseen.vocabulary.sha256:
            raise ConfigError(
                f"data.held_out = {held_out} was tokenised with another vocabulary than {train}; "
                "tokenise both with one"
            )
    for device in {cell.config.run.device for cell in cells}:
        resolve_device(device)


def record_of(grid: Grid, cell: Cell) -> RunRecord:
    """What a run that was trained gave. RunFailedError where it has no held-out loss."""
    found = read_records(cell.folder / "metrics.jsonl")
    evaluations = [r for r in found if isinstance(r, EvaluationRecord)]
    if not evaluations or evaluations[-1].step != cell.config.schedule.steps:
        raise RunFailedError("it has no held-out loss at its last step")
    last = evaluations[-1]
    steps = [r for r in found if isinstance(r, StepRecord)][_WARM_UP_RECORDS:]
    mfu = [r.mfu for r in steps if not isinstance(r.mfu, UnsetType)]
    config, counts = cell.config, _counts(cell)
    assert config.data.held_out is not None
    held_out = Shards(config.data.held_out).meta
    try:
        return RunRecord(
            name=cell.name,
            chain=cell.chain,
            model=cell.model,
            ratio=cell.ratio,
            chosen=config.model.experts_per_token,
            seed=cell.seed,
            active=counts.active_non_embedding,
            total=counts.non_embedding,
            tokens=last.tokens,
            loss=last.held_out_loss,
            evaluated_tokens=last.evaluated_tokens,
            bytes_per_token=held_out.text_bytes / held_out.tokens,
            flops_per_token=counts.flops_per_token,
            layers=config.model.layers,
            width=config.model.width,
            tokens_per_second=(
                statistics.median(r.tokens_per_second for r in steps) if steps else UNSET
            ),
            mfu=statistics.median(mfu) if mfu else UNSET,
            arguments=tuple(arguments(grid, cell)),
            config_sha256=_fingerprint(cell),
            hardware=_hardware(config.run.device),
            versions={"fourfold": __version__, "torch": str(torch.__version__)},
        )
    except ValueError as error:
        raise RunFailedError(f"it is no run to learn from: {error}") from error


def _counts(cell: Cell) -> Counts:
    config = cell.config
    vocabulary = Shards(config.data.train).meta.vocabulary
    decoder = model_config(config.model, config.router, vocabulary.tokens, vocabulary.end_of_text)
    return count(decoder, config.data.length)


def _fingerprint(run: Run) -> str:
    """What makes two runs give the same: their fields but for those that have their default, so
    that a field that comes later does not make another run of one that was finished."""
    given: dict[str, object] = {}
    for section in msgspec.structs.fields(run.config):
        values = getattr(run.config, section.name)
        for field in msgspec.structs.fields(values):
            name, value = f"{section.name}.{field.name}", getattr(values, field.name)
            if name not in _SAME_RESULT and value != field.default:
                given[name] = value
    return hashlib.sha256(msgspec.json.encode(given, order="sorted")).hexdigest()


def _hardware(name: str) -> str:
    device = resolve_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()

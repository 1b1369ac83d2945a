"""Checkpoints of a run: all there is to continue it exactly, on any number of processes.

A checkpoint is a folder with `state.safetensors` (master weights, optimizer moments, selection
biases, whole) and `progress.json`. It is written under another name, flushed to disk and renamed:
what bears a checkpoint's name is complete, whenever the writer was killed.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fourfold.errors import CheckpointError, ConfigError
from fourfold.files import flush
from fourfold.models.config import ModelConfig
from fourfold.models.decoder import Decoder
from fourfold.models.layers import SparseFFN
from fourfold.quantize.weights import DenseWeight
from fourfold.train.data.shards import Contents
from fourfold.train.optim import Optimizer
from fourfold.train.parallel import Parallel

_STATE, _PROGRESS = "state.safetensors", "progress.json"
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished-"


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a run came: `steps` taken, which is also the next global batch."""

    steps: int
    tokens: int
    """Predicted so far."""
    seconds: float
    """Of training so far, without evaluations and checkpoints."""
    loss_mean: float
    loss_deviation: float
    """Of recent losses, for telling spikes."""
    rows: int
    """Of a global batch; with `length` and `seed` what a batch's number means."""
    length: int
    seed: int
    model: ModelConfig | None = None
    """What was trained: gates, rotation or how many experts are chosen show in no tensor. None in
    checkpoints that were written without it."""
    contents: Contents | None = None
    """Of the shards that were read. None where there were none, and in checkpoints that were
    written without it."""


def save(
    folder: Path,
    progress: Progress,
    model: Decoder,
    optimizer: Optimizer,
    parallel: Parallel,
    *,
    keep: int,
) -> None:
    """Writes a checkpoint below `folder` and removes all but the newest `keep`. Every process must
    call it; the first writes. OSError or SafetensorError where that cannot be, as on a full disk;
    the checkpoints that there are stay."""
    tensors = {}
    for name, tensor in [*optimizer.state(), *_biases(model)]:
        if parallel.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if parallel.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(stale)
    unfinished = folder / f"{_UNFINISHED}{progress.steps:08d}"
    unfinished.mkdir()
    try:
        _write(unfinished, tensors, progress)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished)  # a full disk needs the room
        raise
    final = folder / f"step-{progress.steps:08d}"
    if final.exists():
        _remove(final)
    unfinished.rename(final)
    flush(folder)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def _write(folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    save_file(tensors, folder / _STATE)
    (folder / _PROGRESS).write_bytes(msgspec.json.encode(progress))
    # Some versions of safetensors leave what only its owner can read.
    shutil.copymode(folder / _PROGRESS, folder / _STATE)
    for path in (folder / _STATE, folder / _PROGRESS, folder):
        flush(path)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load(
    path: Path, model: Decoder, optimizer: Optimizer, contents: Contents | None = None
) -> Progress:
    """Puts a checkpoint's contents in their places. `CheckpointError` where it is of another model
    or optimizer, or is damaged; `ConfigError` where it is of other `contents`."""
    try:
        progress = msgspec.json.decode((path / _PROGRESS).read_bytes(), type=Progress)
        _check_contents(path, progress.contents, contents)
        other = _differing(progress.model, model.config) if progress.model else ""
        if other:
            raise _of_another_model(path, other)
        with safe_open(path / _STATE, framework="pt") as file:
            biases = _biases(model)
            known = {*optimizer.names(), *(name for name, _ in biases)}
            if differing := known.symmetric_difference(file.keys()):
                raise _of_another_model(path, f"only one of them has {min(differing)}")
            optimizer.load(file.get_tensor)
            for name, bias_E in biases:
                with torch.no_grad():
                    bias_E.copy_(file.get_tensor(name))
    except (OSError, msgspec.DecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this run ({error}); {_instead_of(path)}"
        ) from None
    except RuntimeError as error:
        raise _of_another_model(path, str(error)) from None
    return progress


def _instead_of(path: Path) -> str:
    """What to do where a checkpoint cannot be read."""
    if within := checkpoints(path / "checkpoints"):
        return f"name {within[-1]}"
    others = [found for found in checkpoints(path.parent) if found != path]
    if path.is_dir() and others:
        return f"delete it to go on from {others[-1]}, or take a new run.folder"
    return "name another, or take a new run.folder"


def _check_contents(path: Path, was: Contents | None, now: Contents | None) -> None:
    """What is not known of either is not checked."""
    if was is None or now is None or was.sha256 == now.sha256:
        return
    raise ConfigError(
        f"data.train = {now} is other text than {path} was trained on, {was}; use that, or begin "
        "anew with another run.folder and without run.start_from"
    )


def _differing(was: ModelConfig, now: ModelConfig) -> str:
    """In what two models differ whose tensors may be alike; empty where in nothing."""
    before, after = _leaves(was), _leaves(now)
    names = [name for name in after if before.get(name) != after[name]]
    return ", ".join(f"{name} = {after[name]}, not {before.get(name)}" for name in names)


def _leaves(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model and of its parts, by their paths."""
    leaves: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            leaves |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            leaves[name] = value
    return leaves


def _of_another_model(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is of another model or optimizer ({how}); use its [model], [router] and "
        "[optimizer], or a new run.folder"
    )


def weights_of(model: Decoder, optimizer: Optimizer, parallel: Parallel) -> dict[str, Tensor]:
    """The master weights and selection biases of a model, whole, on the CPU, by the names that
    families place tensors at. Every process must call it; only the first gets them."""
    dense = {path for path, module in model.named_modules() if isinstance(module, DenseWeight)}
    weights: dict[str, Tensor] = {}
    for name, tensor in optimizer.weights():
        if parallel.rank:
            continue
        owner = name.removesuffix(".weight")
        weights[owner if owner in dense else name] = tensor.cpu()
    if parallel.rank:
        return weights
    return weights | {name: bias_E.cpu() for name, bias_E in _biases(model)}


def _biases(model: Decoder) -> list[tuple[str, Tensor]]:
    return [
        (f"layers.{layer}.ffn.router.selection_bias", block.ffn.router.selection_bias)
        for layer, block in enumerate(model.blocks)
        if isinstance(block.ffn, SparseFFN) and block.ffn.router.selection_bias is not None
    ]


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no part of it is ever taken for one."""
    gone = path.with_name(f"{_UNFINISHED}{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)

"""What a run tells about itself: one line of JSON a step that is logged, and what went wrong.

A field that is not known is absent: the MFU of a device whose peak is not known, the loads of a
dense model.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

if TYPE_CHECKING:
    import torch

# Dense bfloat16 FLOP/s that a device's makers state.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
# A loss so many deviations above the recent mean is a spike; early on losses fall too fast to tell.
_SPIKE = 6.0
_SPIKE_AFTER = 50
_MEMORY = 0.98
# An expert with less than this share of the mean load is dead. With fewer rows than this for each
# expert of a layer, chance alone leaves some without any.
_DEAD = 0.01
_JUDGED = 20


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One logged step. Times are over the steps since the last logged one, loads since they were
    last told: they are, where enough rows were routed to judge them."""

    step: int
    """Steps taken."""
    tokens: int
    """Predicted so far."""
    loss: float
    """Mean cross-entropy of this step's tokens, nats."""
    gradient_norm: float
    """Before clipping."""
    rate: float
    tokens_per_second: float
    mfu: float | UnsetType = UNSET
    """Share of the peak of all devices, by `model.Counts.flops_per_token`."""
    balance: float | UnsetType = UNSET
    """The balance loss, unweighted: 1 where loads are even."""
    z: float | UnsetType = UNSET
    load_most: float | UnsetType = UNSET
    """The largest load of an expert over the mean of its layer, in the worst layer."""
    load_least: float | UnsetType = UNSET
    dead_experts: int | UnsetType = UNSET
    """Experts that got hardly any row."""
    spike: bool = False
    """Whether the loss jumped."""


class EvaluationRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An evaluation on held-out text."""

    step: int
    tokens: int
    held_out_loss: float
    """Mean cross-entropy, nats per token."""
    evaluated_tokens: int


Record = StepRecord | EvaluationRecord


class SpikeWatch:
    """Knows the mean and deviation of recent losses, and which loss is far above them."""

    def __init__(self, steps: int = 0, mean: float = 0.0, deviation: float = 0.0) -> None:
        self._steps, self.mean, self.deviation = steps, mean, deviation

    def see(self, loss: float) -> bool:
        """Takes the next loss; whether it is a spike. A spike does not move what is usual by more
        than any loss may."""
        limit = self.mean + _SPIKE * self.deviation
        spike = self._steps >= _SPIKE_AFTER and loss > limit
        if self._steps == 0:
            self.mean = loss
        else:
            off = min(loss, limit) - self.mean if spike else loss - self.mean
            self.mean += (1 - _MEMORY) * off
            variance = _MEMORY * (self.deviation**2 + (1 - _MEMORY) * off**2)
            self.deviation = math.sqrt(variance)
        self._steps += 1
        return spike


def read_records(path: Path) -> list[Record]:
    """The records of a run, in order; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    records: list[Record] = []
    for line in path.read_bytes().splitlines():
        try:
            fields = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if "held_out_loss" in fields:
            records.append(msgspec.convert(fields, EvaluationRecord))
        else:
            records.append(msgspec.convert(fields, StepRecord))
    return records


class Metrics:
    """Writes the records of one run to `metrics.jsonl`, and to TensorBoard where that is wanted."""

    def __init__(self, folder: Path, *, steps: int, tensorboard: bool) -> None:
        """Records of steps after `steps`, where a run is continued, are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [record for record in read_records(path) if record.step <= steps]
        evaluated = [record.step for record in kept if isinstance(record, EvaluationRecord)]
        self.evaluated = evaluated[-1] if evaluated else None
        """The step of the last evaluation that was there."""
        written = path.with_suffix(".new")
        written.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in kept))
        os.replace(written, path)
        self._file = path.open("ab")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)

    def write(self, record: Record) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in msgspec.to_builtins(record).items():
            if name not in ("step", "tokens"):
                self._board.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def can_judge(load_LE: torch.Tensor) -> bool:
    """Whether enough rows [layers, E] went to the experts to tell uneven loads from chance."""
    return bool(load_LE.sum(1).min() >= _JUDGED * load_LE.shape[1])


def loads(load_LE: torch.Tensor) -> tuple[float, float, int]:
    """Most and least load over the layer's mean, and how many experts are dead, from rows [layers,
    E] that went to each."""
    relative_LE = load_LE / load_LE.mean(1, keepdim=True).clamp_min(1e-9)
    dead = int((relative_LE < _DEAD).sum())
    return float(relative_LE.max()), float(relative_LE.min()), dead


def peak_flops(device: torch.device) -> float | None:
    """The bfloat16 FLOP/s that a device's makers state; None where we do not know them."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)

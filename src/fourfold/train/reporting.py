"""Turns what steps return into records: means over what is logged, spikes, dead experts, speed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor

from fourfold.errors import FourfoldError
from fourfold.train.metrics import Metrics, Record, SpikeWatch, StepRecord, can_judge, loads

Watch = Callable[[Record], None]
"""Is told every record."""


class TrainingError(FourfoldError):
    """A run that cannot go on."""


class Moment:
    """When all that a device was given before is done. Two of them say how long it took between
    them, whenever the host comes to ask."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._at = time.perf_counter()

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, before: Moment) -> float:
        """From an earlier one to this, which has come."""
        if self._event is None or before._event is None:
            return self._at - before._at
        milliseconds: float = before._event.elapsed_time(self._event)
        return milliseconds / 1e3


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step that the device may still be busy with; its tensors are sums over all processes, on
    their way to the host: `done` is when they are there."""

    step: int
    """Steps taken with this one."""
    counted: int
    """Tokens that it predicted."""
    tokens: int
    """Predicted so far."""
    rate: float
    sums_5: Tensor
    """Cross-entropy over its tokens, balance loss, z-loss, gradient norm, processes that were asked
    to end."""
    load_LE: Tensor | None
    """Rows that went to each expert of each sparse layer."""
    done: Moment

    @classmethod
    def fetched(
        cls,
        step: int,
        counted: int,
        tokens: int,
        rate: float,
        sums_5: Tensor,
        load_LE: Tensor | None,
    ) -> Launched:
        """A step whose tensors are copied to the host once they are computed. Who reads them waits
        for these copies, not for what the device is given meanwhile."""
        device = sums_5.device
        if device.type == "cuda":
            sums_5 = sums_5.to("cpu", non_blocking=True)
            if load_LE is not None:
                load_LE = load_LE.to("cpu", non_blocking=True)
        return cls(step, counted, tokens, rate, sums_5, load_LE, Moment(device))


class Reporter:
    """Reads launched steps, one after the other, and writes those that are due."""

    def __init__(
        self,
        log: Metrics | None,
        watch: Watch,
        *,
        device: torch.device,
        every: int,
        last: int,
        flops_per_token: float,
        peak: float | None,
        spikes: SpikeWatch,
    ) -> None:
        """
        Args:
            log: takes the records; None in processes that write none.
            watch: is told every record that is written.
            device: what steps are computed on.
            every: steps between records.
            last: the run's last step, which is always recorded.
            flops_per_token: of training.
            peak: FLOP/s of all devices together, where they are known.
            spikes: what losses were usual so far.
        """
        self._log, self._watch = log, watch
        self._device = device
        self._every, self._last = every, last
        self._flops_per_token, self._peak = flops_per_token, peak
        self.spikes = spikes
        self.seconds = 0.0
        """Of the steps that were read."""
        self._begun = Moment(device)
        self._window = (0, 0.0)
        self._load_LE: Tensor | None = None

    def begin(self) -> None:
        """Starts the clock, after something that is no training."""
        self._begun = Moment(self._device)

    def read(self, launched: Launched) -> bool:
        """Waits for a step and reports it; returns whether a process was asked to end before it.
        `TrainingError` where its loss is no number."""
        launched.done.wait()
        summed, balance, z, norm, asked = launched.sums_5.tolist()
        loss = summed / max(1, launched.counted)
        # Not when it is read: the next step was launched in between, and of the last one none is.
        took = launched.done.seconds_since(self._begun)
        self._begun = launched.done
        tokens, seconds = self._window
        self._window = (tokens + launched.counted, seconds + took)
        self.seconds += took
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss of step {launched.step} is {loss} and its gradients' norm {norm}; "
                "continue from the last checkpoint with a lower optimizer.rate or optimizer.clip"
            )
        spike = self.spikes.see(loss)
        if launched.load_LE is not None:
            before = self._load_LE
            self._load_LE = launched.load_LE if before is None else before + launched.load_LE
        if spike or launched.step % self._every == 0 or launched.step == self._last:
            self._write(launched, loss, balance, z, norm, spike)
        return bool(asked)

    def _write(
        self, launched: Launched, loss: float, balance: float, z: float, norm: float, spike: bool
    ) -> None:
        tokens, seconds = self._window
        speed = tokens / max(seconds, 1e-9)
        record = StepRecord(
            step=launched.step,
            tokens=launched.tokens,
            loss=loss,
            gradient_norm=norm,
            rate=launched.rate,
            tokens_per_second=speed,
            mfu=UNSET if self._peak is None else speed * self._flops_per_token / self._peak,
            spike=spike,
        )
        if self._load_LE is not None:
            record = msgspec.structs.replace(record, balance=balance, z=z)
            if can_judge(self._load_LE):
                most, least, dead = loads(self._load_LE)
                record = msgspec.structs.replace(
                    record, load_most=most, load_least=least, dead_experts=dead
                )
                self._load_LE = None
        self._window = (0, 0.0)
        self.tell(record)

    def tell(self, record: Record) -> None:
        """Writes a record in the process that writes."""
        if self._log is not None:
            self._log.write(record)
            self._watch(record)

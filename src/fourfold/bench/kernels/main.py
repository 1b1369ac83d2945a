"""Builds, checks and times every case, one after the other, and writes their record.

A kernel that is wrong or fails is reported and the rest is still measured, but the run then fails
and leaves no record.
"""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
from collections.abc import Iterator

import torch

from fourfold.bench.command_line import command_line
from fourfold.bench.kernels.case import Case
from fourfold.bench.kernels.ceilings import ceilings
from fourfold.bench.kernels.config import KernelsBenchConfig, case_files
from fourfold.bench.kernels.report import (
    Measured,
    WrongResultError,
    header,
    line,
    measure,
    results,
)
from fourfold.bench.kernels.timing import CudaTimer, Timer
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.errors import ConfigError

_PACKAGES = ("fourfold", "torch", "triton")


def main(config: KernelsBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record; 1 where a kernel failed."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "the kernels are measured on a GPU and torch finds none; run this on a machine with "
            "an NVIDIA GPU, its driver and a CUDA build of torch"
        )
    check_out(config.out, config.name)
    device = torch.device("cuda")
    run = Run(CudaTimer())
    print(header())
    run.ceilings(ceilings(device))
    for name in config.only or case_files():
        module = importlib.import_module(f"fourfold.bench.kernels.cases.{name}")
        run.cases(module.cases(device))
        if not _usable():
            print(f"fourfold: {name} broke the device, nothing after it runs", file=sys.stderr)
            break
    if not run.sound:
        return 1
    if config.out is not None:
        command = command_line("fourfold bench kernels", config)
        write(new_record(config.name, command, run.figures, packages=_PACKAGES), config.out)
    return 0


class Run:
    """The figures so far, and whether every kernel gave them."""

    def __init__(self, timer: Timer) -> None:
        self.figures: list[Result] = []
        self.sound = True
        self._timer = timer
        self._limits: dict[str, float] = {}

    def ceilings(self, cases: Iterator[Case]) -> None:
        """Measures what the device can do, which the kernels after it are compared with."""
        for case in cases:
            measured = measure(case, self._timer)
            self._take(measured)
            self._limits[case.ceiling] = measured.rate

    def cases(self, cases: Iterator[Case]) -> None:
        """Measures a file's cases; after one that fails (not just: is wrong) its file is left."""
        try:
            for case in cases:
                try:
                    self._take(measure(case, self._timer))
                except WrongResultError as error:
                    self._fail(str(error))
                del case
                _free()
        except Exception:
            self._fail(traceback.format_exc())

    def _take(self, measured: Measured) -> None:
        print(line(measured, self._limits), flush=True)
        self.figures += results(measured, self._limits)

    def _fail(self, why: str) -> None:
        print(f"fourfold: {why}", file=sys.stderr, flush=True)
        self.sound = False


def _usable() -> bool:
    """Whether the device still answers; an illegal access leaves it unusable to this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _free() -> None:
    """Gives back what a case took, graphs' pools included, before the next takes more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

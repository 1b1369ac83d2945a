"""Compiles all candidates side by side, checks that they agree, times them in turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import partial

import torch

from fourfold.bench.command_line import command_line
from fourfold.bench.figures import format_figure
from fourfold.bench.kernels.timing import CudaTimer, Timer
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.bench.tiles.config import TilesBenchConfig
from fourfold.bench.tiles.products import Work, works
from fourfold.errors import ConfigError
from fourfold.kernels.compiling import KernelCompiler
from fourfold.kernels.w4a8_gemm.choose import Kernel, Tiles
from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe

_NAME = "tiles"
_DIFFERENCE = 1e-3
"""Relative, of results rounded to bfloat16 whose sums are the same."""
_SHOWN = 3


def main(config: TilesBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record; 1 where tiles disagree."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "tiles are timed on a GPU and torch finds none; run this on a machine with an NVIDIA "
            "GPU, its driver and a CUDA build of torch"
        )
    check_out(config.out, _NAME)
    figures: list[Result] = []
    wrong = 0
    with contextlib.ExitStack() as stack:
        # They fork, so before the GPU is used.
        compilers = [stack.enter_context(KernelCompiler()) for _ in config.products]
        device = torch.device("cuda", torch.cuda.current_device())
        hopper = torch.cuda.get_device_capability() == (9, 0)
        timer = CudaTimer()
        for product, compiler in zip(config.products, compilers, strict=True):
            recipe = W4A8Recipe(config.recipe)
            todo = list(works(product, config.tokens, recipe, device, hopper=hopper))
            compiler.start(partial(_walk, todo), device)
            compiler.wait()
            for work in todo:
                differ = disagreeing(work)
                for tiles in differ:
                    print(f"fourfold: {work.name}: {describe(tiles)} is wrong", file=sys.stderr)
                wrong += len(differ)
                figures.append(compare(work, timer, leave_out=differ))
    if wrong:
        return 1
    if config.out is not None:
        command = command_line("fourfold bench tiles", config)
        write(
            new_record(_NAME, command, figures, packages=("fourfold", "torch", "triton")),
            config.out,
        )
    return 0


def _walk(todo: Sequence[Work]) -> None:
    for work in todo:
        for tiles in (work.chosen, *work.candidates):
            work.run(tiles)


def disagreeing(work: Work) -> list[Tiles]:
    """The candidates whose results are not the chosen one's. RuntimeError names one that ends the
    device."""
    wanted = work.run(work.chosen).float()
    allowed = _DIFFERENCE * wanted.norm()
    differ = []
    for tiles in work.candidates:
        try:
            if not (work.run(tiles).float() - wanted).norm() <= allowed:
                differ.append(tiles)
        except torch.AcceleratorError as error:
            raise RuntimeError(f"{work.name}: {describe(tiles)} ends the device") from error
    return differ


def compare(work: Work, timer: Timer, *, leave_out: Sequence[Tiles] = ()) -> Result:
    """Times the chosen tiles and the candidates, prints the best, and returns both as a figure."""
    tried = [work.chosen, *(each for each in work.candidates if each not in leave_out)]
    timings = timer([partial(work.run, tiles) for tiles in tried], graph=True)
    seconds = [timing.seconds for timing in timings]
    order = sorted(range(len(tried)), key=seconds.__getitem__)
    best = order[0]
    of_best = f"{seconds[0] / seconds[best]:.2f} times the best of {len(tried)}"
    print(
        f"{work.name}: chosen {format_figure(seconds[0], 's')} ({of_best}): {describe(work.chosen)}"
    )
    for place in order[:_SHOWN]:
        print(f"    {format_figure(seconds[place], 's')}  {describe(tried[place])}", flush=True)
    return Result(
        case=work.name,
        metric="chosen",
        value=seconds[0],
        unit="s",
        limit=seconds[best],
        limit_name=f"the best tiles: {describe(tried[best])}",
    )


def describe(tiles: Tiles) -> str:
    """Tiles in words."""
    cut = f"{tiles.kernel.value} {2 * tiles.half} x {tiles.tokens}"
    split = f", K split {tiles.split}" if tiles.split > 1 else ""
    if tiles.kernel is Kernel.FEW:
        return f"{cut}, {tiles.warps} warps{split}"
    unroll = f", unrolled {tiles.unroll}" if tiles.unroll > 1 else ""
    return (
        f"{cut}, {tiles.stages} stages, {tiles.warps} warps, "
        f"{tiles.programs} programs{split}{unroll}"
    )

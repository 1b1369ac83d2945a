"""Compiles the kernels that a calibration times, before it times any: in one process for each part,
because a compiler keeps one core busy and Triton keeps what it made on the disk, for all processes.

    python -m fourfold.bench.calibrate.compiling PART
"""

from __future__ import annotations

import subprocess
import sys

import torch

from fourfold.bench.calibrate.points import POINTS, decode_attention_steps
from fourfold.quadrants.costs import PARTS


def compile_parts() -> None:
    """Compiles for all parts at once. What does not compile here fails again where it is timed."""
    command = [sys.executable, "-m", "fourfold.bench.calibrate.compiling"]
    quiet = subprocess.DEVNULL
    running = [subprocess.Popen([*command, part], stdout=quiet, stderr=quiet) for part in PARTS]
    try:
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()


def compile_part(part: str) -> None:
    """Does every piece of work of one part once."""
    device = torch.device("cuda")
    if part in POINTS:
        for point in POINTS[part](device):
            point.run()
    else:
        for random, plans in decode_attention_steps(device):
            for plan in plans:
                random.code(0, random.buffers(plan))
    torch.cuda.synchronize()


if __name__ == "__main__":
    compile_part(sys.argv[1])

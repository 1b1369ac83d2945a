"""The long form: `python -m tests.cpu.chaos --seconds 600 --seed 7`; 1 if the promise is broken."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "cuda" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from tests.cpu import tiny
from tests.cpu.chaos.run import Plan, Run
from tests.cpu.gateway.made_tokenizers import write_default


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cpu.chaos")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        folder = Path(made)
        plan = Plan(
            seed=seed,
            seconds=options.seconds,
            questions=options.questions,
            requests=20,
            faults=10,
            restarts=int(options.seconds // 60),
            device=options.device,
            starts_again=True,
            long_freeze=30.0,
        )
        checkpoint = tiny.save_checkpoint("mixtral", folder / "mixtral")
        run = Run(plan, checkpoint, write_default(folder / "words"), folder)
        asyncio.run(run.go())
    for told in run.story.told:
        print(told, end="\n\n")
    print(run.story.report(seed))
    return 1 if run.story.violations else 0


if __name__ == "__main__":
    sys.exit(main())

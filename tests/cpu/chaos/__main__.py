"""The long form: `python -m tests.cpu.chaos --seconds 600 --seed 7`; 1 if the promise is broken."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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

from tests.cpu.chaos.run import Plan, Run
from tests.cpu.chaos.served import coded_pages, float_pages
from tests.cpu.gateway.made_tokenizers import write_default


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cpu.chaos")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kv-pages", choices=("float", "int8"), default="float")
    parser.add_argument("--keep", type=Path, help="a new folder for what workers log")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = options.keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            seed=seed,
            seconds=options.seconds,
            questions=options.questions,
            requests=20,
            faults=10,
            restarts=int(options.seconds // 60),
            starts_again=True,
            long_freeze=30.0,
        )
        make = float_pages if options.kv_pages == "float" else coded_pages
        served = make(folder, options.device)
        run = Run(plan, served, write_default(folder / "words"), folder)
        asyncio.run(run.go())
    for told in run.story.told:
        print(told, end="\n\n")
    print(run.story.report(seed))
    return 1 if run.story.violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""Several processes of the toy runs: `python -m tests.cpu.train.ranks FOLDER DEVICE COUNT...`.

So many processes at a time, which find each other by the environment, as with torchrun. They run
every case that is for so many, one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from fourfold.train.config import TrainConfig
from fourfold.train.parallel import Parallel, joined
from tests.cpu.train import toy

MUON: dict[str, Any] = {"optimizer": {"kind": "muon"}}
GROUPS_OF_TWO: dict[str, Any] = {"parallel": {"experts": 2}}
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "experts apart": (GROUPS_OF_TWO,),
    "experts apart, sigmoid, muon": (toy.SIGMOID, MUON, GROUPS_OF_TWO),
    "experts sharded": (),
    "experts sharded, muon, micro-batches": (
        MUON,
        {"run": {"micro_rows": 2}, "router": {"balance_over": "sequence"}},
    ),
    "dense": (toy.DENSE,),
    "experts apart, bfloat16": ({"run": {"dtype": "bfloat16"}}, GROUPS_OF_TWO),
}
# As weights are usually drawn, experts' gradients are a fiftieth of the norm of all.
STEEP: dict[str, Any] = {"model": {"deviation": 0.3}}
OF_FOUR: dict[str, tuple[dict[str, Any], ...]] = {
    "two groups": (STEEP, GROUPS_OF_TWO),
    "two groups, sigmoid, muon": (toy.SIGMOID, MUON, STEEP, GROUPS_OF_TWO),
}
"""Cases of four processes: each expert is held by two."""
STEPS = 3
STOPPED = 3


def config_of(case: str, folder: Path, *changes: dict[str, Any]) -> TrainConfig:
    short = {
        "schedule": {"steps": STEPS, "warmup": 1, "decay": 0.0},
        "run": {"evaluate_batches": 1},
    }
    return toy.config(
        folder / case.replace(", ", "-").replace(" ", "-"),
        *(CASES | OF_FOUR)[case],
        short,
        *changes,
    )


def run_two(folder: Path, device: str) -> Path:
    """Has two processes run all of `CASES`; returns the folder that has what they left."""
    return _run(folder, device, 2)


def run_all(folder: Path) -> Path:
    """Has them, and after them four that run all of `OF_FOUR`, on the CPU; likewise."""
    return _run(folder, "cpu", 2, 4)


def _run(folder: Path, device: str, *worlds: int) -> Path:
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tests.cpu.train.ranks", str(folder), device, *map(str, worlds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = ""
    try:
        said = launcher.communicate(timeout=110)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, said
    return folder


def main(folder: Path, device: str, worlds: list[int]) -> int:
    """Forks the processes, so that what they import is imported once; how many failed."""
    forking = multiprocessing.get_context("fork")
    failed = 0
    for world in worlds:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
        }
        processes = [
            forking.Process(target=_take_steps, args=(folder, device, rank))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed += sum(process.exitcode != 0 for process in processes)
    return failed


def _take_steps(folder: Path, device: str, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    section = toy.config(folder).parallel
    with joined(section, torch.device(device)) as parallel:
        for case in CASES if parallel.world == 2 else OF_FOUR:
            config = config_of(case, folder)
            size = config.parallel.experts
            mesh = init_device_mesh(device, (parallel.world // size, size))
            trainer = toy.trainer(config, parallel=dataclasses.replace(parallel, mesh=mesh))
            trainer.run(held_out=toy.chain(config, seed=1))
            trainer.export(Path(config.run.folder) / "model")
        if parallel.world == 2:
            _stop(folder, parallel)


def _stop(folder: Path, parallel: Parallel) -> None:
    """A run that is not stopped, and one that only the second process is asked to end."""
    for name in ("whole", "stopped"):
        config = toy.config(folder / name, {"schedule": {"steps": 8}, "run": {"keep": 9}})
        trainer = toy.trainer(config, parallel=parallel)
        asks = name == "stopped" and parallel.rank == 1
        if trainer.run(asked=lambda trainer=trainer, asks=asks: asks and trainer.steps >= STOPPED):  # type: ignore[misc]
            toy.trainer(config, parallel=parallel).run()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], list(map(int, sys.argv[3:]))))

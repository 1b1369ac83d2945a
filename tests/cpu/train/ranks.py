"""One of several processes of the toy runs: `python -m tests.cpu.train.ranks FOLDER DEVICE`.

The processes are started together with `RANK`, `WORLD_SIZE` and where to meet in the environment,
as torchrun does, and run every case one after the other.
"""

from __future__ import annotations

import dataclasses
import os
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
TWO_GROUPS: dict[str, Any] = {"parallel": {"experts": 2}}
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "experts apart": (TWO_GROUPS,),
    "experts apart, sigmoid, muon": (toy.SIGMOID, MUON, TWO_GROUPS),
    "experts sharded": (),
    "experts sharded, muon, micro-batches": (
        MUON,
        {"run": {"micro_rows": 2}, "router": {"balance_over": "sequence"}},
    ),
    "dense": (toy.DENSE,),
    "experts apart, bfloat16": ({"run": {"dtype": "bfloat16"}}, TWO_GROUPS),
}
STEPS = 3
STOPPED = 3


def config_of(case: str, folder: Path, *changes: dict[str, Any]) -> TrainConfig:
    short = {
        "schedule": {"steps": STEPS, "warmup": 1, "decay": 0.0},
        "run": {"evaluate_batches": 1},
    }
    return toy.config(
        folder / case.replace(", ", "-").replace(" ", "-"), *CASES[case], short, *changes
    )


def run_two(folder: Path, device: str) -> Path:
    """Has two processes run every case; returns the folder that has what they left."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cpu.train.ranks", str(folder), device],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        said = [process.communicate(timeout=110)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return folder


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    section = toy.config(folder).parallel
    with joined(section, torch.device(device)) as parallel:
        for case in CASES:
            config = config_of(case, folder)
            size = config.parallel.experts
            mesh = init_device_mesh(device, (parallel.world // size, size))
            trainer = toy.trainer(config, parallel=dataclasses.replace(parallel, mesh=mesh))
            trainer.run(held_out=toy.chain(config, seed=1))
            trainer.export(Path(config.run.folder) / "model")
        _stop(folder, parallel)


def _stop(folder: Path, parallel: Parallel) -> None:
    """A run that is not stopped, and one that only the second process is asked to end."""
    for name in ("whole", "stopped"):
        config = toy.config(folder / name, {"schedule": {"steps": 8}, "run": {"keep": 9}})
        trainer = toy.trainer(config, parallel=parallel)
        asks = name == "stopped" and parallel.rank == 1
        if trainer.run(asked=lambda trainer=trainer, asks=asks: asks and trainer.steps >= STOPPED):
            toy.trainer(config, parallel=parallel).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

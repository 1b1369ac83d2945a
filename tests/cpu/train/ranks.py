"""One of several processes of the toy runs: `python -m tests.cpu.train.ranks FOLDER`.

The processes are started together with `RANK`, `WORLD_SIZE` and where to meet in the environment,
as torchrun does, and run every case one after the other.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from fourfold.train.config import TrainConfig
from fourfold.train.parallel import joined
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
}
STEPS = 4


def config_of(case: str, folder: Path, *changes: dict[str, Any]) -> TrainConfig:
    short = {
        "schedule": {"steps": STEPS, "warmup": 1, "decay": 0.0},
        "run": {"evaluate_batches": 1},
    }
    return toy.config(
        folder / case.replace(", ", "-").replace(" ", "-"), *CASES[case], short, *changes
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    section = toy.config(folder).parallel
    with joined(section, torch.device("cpu")) as parallel:
        for case in CASES:
            config = config_of(case, folder)
            size = config.parallel.experts
            mesh = init_device_mesh("cpu", (parallel.world // size, size))
            trainer = toy.trainer(config, parallel=dataclasses.replace(parallel, mesh=mesh))
            trainer.run(held_out=toy.chain(config, seed=1))
            trainer.export(Path(config.run.folder) / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

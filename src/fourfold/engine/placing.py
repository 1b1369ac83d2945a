"""Which device a worker computes on, where several share a machine."""

from __future__ import annotations

import dataclasses

from fourfold.engine.building import EngineSetup
from fourfold.errors import ConfigError


def place(setup: EngineSetup, ordinal: int, workers: int) -> EngineSetup:
    """The setup of worker `ordinal` of `workers` on this machine: they are dealt out over the GPUs
    unless one device was named. Raises `ConfigError` where several would share a GPU without a
    budget for their pages."""
    if setup.device == "cpu":
        return setup
    import torch

    gpus = torch.cuda.device_count()
    sharing = workers
    if setup.device in ("auto", "cuda"):
        if not gpus:  # what this means is said where the device is resolved
            return setup
        sharing = len(range(ordinal % gpus, workers, gpus))
        setup = dataclasses.replace(setup, device=f"cuda:{ordinal % gpus}")
    if sharing > 1 and setup.config.kv_memory_gib is None:
        raise ConfigError(
            f"{sharing} workers share the GPU {setup.device}; give --kv-memory-gib, the memory "
            "that each of them may take for KV pages"
        )
    return setup

"""What every worker of a run serves, and the oracle beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from fourfold.engine.building import EngineSetup
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.runner import Runner
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.loading import (
    LoadOptions,
    load_model,
    page_shape,
    pages_of,
    read_model_config,
)
from fourfold.models.precision import PageFormat, Precision
from tests.cpu import tiny

PAGES = 96
"""Of every worker: few, so that they are evicted and fought for."""
_RUNNING = 8


@dataclasses.dataclass(frozen=True)
class Served:
    """A checkpoint of random weights on one kind of device."""

    checkpoint: Path
    device: str
    precision: Precision
    kv_pages: PageFormat

    @property
    def exact(self) -> bool:
        """Whether answers are the same whatever shares a step."""
        return self.kv_pages is PageFormat.FLOAT

    @property
    def engine(self) -> EngineConfig:
        """Of every worker."""
        return EngineConfig(
            kv_memory_gib=self._gib(PAGES, _RUNNING),
            kv_pages=self.kv_pages,
            max_running=_RUNNING,
            step_tokens=128,
            decode_threads=1,
        )

    @property
    def setup(self) -> EngineSetup:
        """What the gateway hands its workers."""
        return EngineSetup(
            source=find_source(str(self.checkpoint)),
            device=self.device,
            precision=self.precision,
            config=self.engine,
        )

    def load(self) -> Decoder:
        """The model in this process."""
        options = LoadOptions(device=torch.device(self.device), precision=self.precision)
        return load_model(find_source(str(self.checkpoint)), options)

    def make_engine(self, model: Decoder, *, running: int, prefix_cache: bool = True) -> Engine:
        """One in this process, with room for all that it is asked at a time."""
        config = EngineConfig(
            kv_memory_gib=self._gib(2 * PAGES, running),
            kv_pages=self.kv_pages,
            max_running=running,
            prefix_cache=prefix_cache,
        )
        return Engine(Runner(model, config, pages_of(model, self.kv_pages)), config)

    def _gib(self, pages: int, running: int) -> float:
        fields = json.loads((self.checkpoint / "config.json").read_text())
        _, config = read_model_config(fields, str(self.checkpoint))
        shape = page_shape(config, self.precision, torch.device(self.device), self.kv_pages)
        return (pages * shape.page_bytes + running * shape.slot_bytes) / 2**30


def float_pages(folder: Path, device: str) -> Served:
    """All in floating point, float32."""
    checkpoint = tiny.save_checkpoint("mixtral", folder / "mixtral")
    return Served(checkpoint, device, Precision.FLOAT32, PageFormat.FLOAT)


def coded_pages(folder: Path, device: str) -> Served:
    """As a GPU serves: weights in 4 bits, pages in 8. Without experts, of which rounding would now
    and then choose others."""
    checkpoint = tiny.save_checkpoint("llama-wide", folder / "llama-wide")
    return Served(checkpoint, device, Precision.W4A8, PageFormat.INT8)

"""Options that several commands share: which model, and how it is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fourfold.engine.config import EngineConfig
from fourfold.gateway.config import GatewayLimits
from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.precision import Precision

if TYPE_CHECKING:
    from fourfold.gateway.gateway import Gateway


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A Hugging Face directory, a .gguf file or a hub id; without it, the embedded default."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU there is."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.AUTO
    """auto: bfloat16 on a GPU; on a CPU w8a8 (8-bit weights and activations) where int8 sums are
    exact, else bfloat16 or float32."""
    load: Literal["checkpoint", "dummy"] = "checkpoint"
    """dummy: random weights for benchmarks; only the configuration is read."""
    routing: Literal["router", "uniform"] = "router"
    """uniform: spread tokens evenly over the experts; only with --load dummy."""

    def source(self) -> Source:
        """The model on disk. Raises `CheckpointError`."""
        return find_source(self.model, revision=self.revision)


def start_model(
    options: ModelOptions,
    source: Source,
    engine: EngineConfig,
    limits: GatewayLimits,
    names: tuple[str, ...] = (),
) -> Gateway:
    """Loads a model with a progress bar on stderr and builds the gateway that answers for it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from fourfold.gateway.local import LocalOptions, make_gateway
    from fourfold.models.loading import LoadOptions, resolve_device

    local = LocalOptions(
        source=source,
        tokenizer=source
        if options.tokenizer is None
        else find_source(options.tokenizer, weights=False),
        load=LoadOptions(
            device=resolve_device(options.device),
            precision=options.precision,
            dummy=options.load == "dummy",
            uniform_routing=options.routing == "uniform",
        ),
        engine=engine,
        limits=limits,
        names=names,
    )
    name = TextColumn("{task.description}", markup=False)
    columns = name, BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    # In a log a bar would leave an empty line.
    hidden = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"loading {source.model_id}", total=None)
        return make_gateway(
            local, lambda done, total: bar.update(task, completed=done, total=total)
        )

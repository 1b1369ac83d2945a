"""Options that several commands share: which model, and how it is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fourfold.engine.config import EngineConfig
from fourfold.errors import ConfigError, RequestError
from fourfold.gateway.config import GatewayLimits
from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.precision import Precision

if TYPE_CHECKING:
    from fourfold.gateway.local import GatewaySetup
    from fourfold.llm import LLM, Asked


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
    """dummy: random weights for benchmarks; only the configuration is read, and where there is no
    tokenizer each token is a word like <17>."""
    routing: Literal["router", "uniform"] = "router"
    """uniform: spread tokens evenly over the experts; only with --load dummy."""

    def source(self) -> Source:
        """The model on disk. Raises `CheckpointError`."""
        return find_source(self.model, revision=self.revision)

    def words(self, source: Source) -> Source:
        """Where the tokenizer of a model is. Raises `CheckpointError`."""
        return source if self.tokenizer is None else find_source(self.tokenizer, weights=False)

    def setup(
        self,
        source: Source,
        config: EngineConfig,
        limits: GatewayLimits,
        names: tuple[str, ...] = (),
    ) -> GatewaySetup:
        """Everything that answers for the model, as chosen. Raises `CheckpointError`."""
        from fourfold.engine.building import EngineSetup
        from fourfold.gateway.local import GatewaySetup

        engine = EngineSetup(
            source=source,
            device=self.device,
            precision=self.precision,
            dummy=self.load == "dummy",
            uniform_routing=self.routing == "uniform",
            config=config,
        )
        words = self.words(source)
        return GatewaySetup(engine=engine, tokenizer=words, limits=limits, names=names)


def check_asked(asked: Asked) -> None:
    """Refuses, by the names of the options and before anything is loaded, what no request may ask
    for. Raises `ConfigError`."""
    from fourfold.gateway.budget import check_options
    from fourfold.llm import options_of

    try:
        check_options(options_of(asked), GatewayLimits(), sys.maxsize)
    except RequestError as error:
        option = f"--{error.param}".replace("_", "-")
        raise ConfigError(f"{option}: {error}") from error


def load_llm(options: ModelOptions, source: Source, config: EngineConfig) -> LLM:
    """The model in this process, loaded behind a progress bar."""
    from fourfold.llm import LLM

    with loading_bar(source.model_id) as progress:
        return LLM(
            source,
            tokenizer=options.tokenizer,
            device=options.device,
            precision=options.precision,
            dummy=options.load == "dummy",
            uniform_routing=options.routing == "uniform",
            progress=progress,
            **vars(config),
        )


@contextlib.contextmanager
def loading_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for what loads inside: call it with bytes read and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    # In a log a bar would leave an empty line.
    hidden = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"loading {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

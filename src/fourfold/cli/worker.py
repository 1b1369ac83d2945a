"""`fourfold worker`: compute for a gateway elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import tyro

from fourfold.cluster.config import LinkConfig
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Role
from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import Source, SourceKind, find_source
from fourfold.models.precision import PageFormat, Precision

if TYPE_CHECKING:
    from fourfold.engine.building import EngineSetup

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE = 130
"""Exit code after a second signal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Joins a gateway that was started with --cluster-port, and computes for it until SIGTERM or
    Ctrl-C. When the gateway is away, it waits for it.

    Without --precision, and with --kv-pages auto, these are what the gateway was started with:
    pages of another kind must be converted on their way from worker to worker."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A Hugging Face directory, a .gguf file or a hub id: a copy of what the gateway serves.
    Without it, that itself, where this machine has it."""
    join: str
    """HOST:PORT of the gateway."""
    role: Annotated[Role, tyro.conf.EnumChoicesFromValues] = Role.BOTH
    """What it is given to compute; every worker can compute everything."""
    name: str | None = None
    """The name it is listed by. Default: this machine's name and the process's number."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU there is."""
    precision: Annotated[Precision | None, tyro.conf.EnumChoicesFromValues] = None
    """As for `fourfold serve`. Default: what the gateway was started with."""
    engine: EngineConfig = EngineConfig()
    host: str = "127.0.0.1"
    """Address at which other workers send pages; beyond loopback only with --key-file."""
    port: int = 0
    """TCP port for the same; 0 takes any free one."""
    links: LinkConfig = LinkConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} must be between 0 and 65535")
        if self.revision is not None and self.model is None:
            raise ConfigError(f"--revision {self.revision} is of a hub id; give that as MODEL")


def run(options: Options) -> int:
    from fourfold.cluster.joining import Joining
    from fourfold.engine.channel import Hello
    from fourfold.engine.worker import Worker
    from fourfold.transport.wire import listen

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    transport = options.links.to_transport(options.host, options.port)
    listen(options.host, options.port).close()  # a taken port is known before the model is loaded
    source = None
    if options.model is not None:
        source = find_source(options.model, revision=options.revision)
    name = options.name or f"{socket.gethostname()}-{os.getpid()}"
    hello = Hello(name, options.role, os.getpid())
    worker = Worker(hello, transport, lambda setup: _own(setup, options, source))
    joining = Joining(worker, name, options.join, transport)

    def on_signal(number: int, frame: object) -> None:
        if joining.leaving:
            os._exit(_AT_ONCE)
        if not worker.ready:
            # Nobody has given it anything yet, and loading may take minutes more. An exception
            # would come out of whatever runs just now, as another one or not at all.
            os._exit(0)
        joining.leave()

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        joining.run()
    finally:
        worker.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _own(setup: EngineSetup, options: Options, source: Source | None) -> EngineSetup:
    """What is built here, of what the gateway serves."""
    config = options.engine
    if config.kv_pages is PageFormat.AUTO:
        config = dataclasses.replace(config, kv_pages=setup.config.kv_pages)
    return dataclasses.replace(
        setup,
        source=source or _find_here(setup.source),
        device=options.device,
        precision=options.precision or setup.precision,
        config=config,
    )


def _find_here(source: Source) -> Source:
    """The gateway's model on this machine. Raises `ConfigError` where it is not."""
    if source.kind is SourceKind.EMBEDDED:
        return find_source(None)
    if not source.path.exists():
        raise ConfigError(
            f"the gateway's model {source.path} is not on this machine; say where it is, or give a "
            "hub id: fourfold worker MODEL"
        )
    return source

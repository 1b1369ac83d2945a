"""`fourfold serve`: answer OpenAI clients over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
import time
from typing import Annotated

import tyro

from fourfold.api.config import ApiConfig
from fourfold.cli.options import ModelOptions, loading_bar
from fourfold.cluster.config import EVERY_ADDRESS, ClusterConfig
from fourfold.engine.config import EngineConfig
from fourfold.errors import ConfigError
from fourfold.gateway.config import GatewayLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serves a model to OpenAI clients until SIGTERM or Ctrl-C."""

    model: ModelOptions = ModelOptions()
    served_name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Further names that requests may use for the model."""
    engine: EngineConfig = EngineConfig()
    limits: GatewayLimits = GatewayLimits()
    cluster: ClusterConfig = ClusterConfig()
    api: ApiConfig = ApiConfig()

    def __post_init__(self) -> None:
        for name in self.served_name:
            if not name.strip() or not name.isprintable():
                raise ConfigError(
                    f"--served-name {name!r} is no name that requests could ask for; give one of "
                    "printable characters"
                )
        port, hosts = self.api.port, (self.api.host, self.cluster.cluster_host)
        overlap = hosts[0] == hosts[1] or not EVERY_ADDRESS.isdisjoint(hosts)
        if port and port == self.cluster.cluster_port and overlap:
            raise ConfigError(f"--port and --cluster-port are both {port}; give one another number")


def _share_cores(engine: EngineConfig, workers: int) -> EngineConfig:
    """Local workers decode with equal shares of the cores; one alone leaves a core for HTTP."""
    if engine.decode_threads is not None:
        return engine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = (cores or 1) // workers if workers > 1 else (cores or 1) - 1
    return dataclasses.replace(engine, decode_threads=max(1, threads))


def further_names(options: Options) -> tuple[str, ...]:
    """Names of the model beside its own; the embedded one is `default`, too."""
    return (*options.served_name, *(("default",) if options.model.model is None else ()))


def run(options: Options) -> int:
    from fourfold.api import server
    from fourfold.api.app import create_app
    from fourfold.cluster.cluster import make_cluster

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    started = time.perf_counter()
    source = options.model.source()
    # Each prompt is held as a request: more of them in one could never be admitted.
    most = min(options.api.max_prompts, options.limits.max_concurrent)
    api = dataclasses.replace(options.api, max_prompts=most)
    listener = server.bind(api)  # a taken port is known before the model is loaded
    engine = _share_cores(options.engine, len(options.cluster.roles))
    setup = options.model.setup(source, engine, options.limits, further_names(options))
    with loading_bar(source.model_id) as progress:
        cluster = make_cluster(
            setup,
            options.cluster,
            progress,
            drain_timeout=api.drain_timeout,
        )
    gateway = cluster.gateway

    def announce(url: str) -> None:
        seconds = time.perf_counter() - started
        served = " and ".join(gateway.model_names)
        print(f"Serving {served} at {url}/v1 (ready after {seconds:.1f} s)", file=sys.stderr)
        if cluster.listener is not None:
            print(f"Workers may join: {cluster.listener.command}", file=sys.stderr)

    async def main() -> None:
        stop = asyncio.Event()
        cluster.start(on_failure=stop.set)
        try:
            app = create_app(gateway, api, cluster.fleet)
            await server.serve(app, gateway, api, listener=listener, on_ready=announce, stop=stop)
        finally:
            await cluster.stop()

    server.run(main())
    if gateway.failure is not None:
        raise gateway.failure
    return 0

"""A gateway and its workers, put together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable

from fourfold.cluster.config import ClusterConfig
from fourfold.cluster.listener import ClusterListener
from fourfold.cluster.local import LocalWorkers
from fourfold.engine.building import ModelFacts, Progress, checkpoint_of
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.gateway.fleet.members import State
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.local import GatewaySetup, assemble
from fourfold.gateway.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_ONE_WORKER = ClusterConfig()
_LOOKS = 0.02
"""Seconds between two looks at workers that are about to ask what to load."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A gateway whose engine is a fleet of workers."""

    gateway: Gateway
    fleet: Fleet
    listener: ClusterListener | None

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Starts the gateway on the running loop, and lets workers join."""
        self.gateway.start(on_failure)
        if self.listener is not None:
            self.listener.start()

    async def stop(self) -> None:
        """Ends what still runs, then the workers."""
        if self.listener is not None:
            self.listener.close()
        await self.gateway.stop()


def make_cluster(
    setup: GatewaySetup,
    config: ClusterConfig = _ONE_WORKER,
    progress: Progress = lambda done, total: None,
    *,
    drain_timeout: float = 30.0,
) -> Cluster:
    """As `make_gateway`, with the model in worker processes; returns when all that are started here
    take requests, or, where there are none, when one has joined.

    A worker that leaves has `drain_timeout` seconds to finish. Raises `ConfigError`,
    `CheckpointError` and what else loading raises there.
    """
    transport = config.to_transport()
    fleet = Fleet(setup.engine, config.fleet, transport, drain_timeout)
    listener = None
    if config.cluster_port is not None:
        listener = ClusterListener(fleet, config.cluster_port, transport)
    local = LocalWorkers(fleet, config.roles)
    try:
        local.start()
        if listener is not None:  # others bring copies of their own
            fleet.checkpoint = checkpoint_of(setup.engine)
        with asyncio.Runner() as runner:
            loading = runner.run(_begin(fleet, local, listener, progress))
            # While the model is loading there; what workers say meanwhile is heard afterwards.
            tokenizer = load_tokenizer(setup.tokenizer, dummy=setup.engine.dummy)
            model = runner.run(_finish(loading))
        gateway = assemble(setup, fleet, tokenizer, model)
    except BaseException:
        local.kill()
        fleet.kill()
        if listener is not None:
            listener.close()
        raise
    fleet.on_failure = gateway.fail
    return Cluster(gateway, fleet, listener)


async def _begin(
    fleet: Fleet, local: LocalWorkers, listener: ClusterListener | None, progress: Progress
) -> asyncio.Task[ModelFacts]:
    """Begins to load the model; returns when all that were started here know what to load, and
    raises what `_load` does where one fails before."""
    loading = asyncio.create_task(_load(fleet, local, listener, progress))
    while any(member.state is State.JOINING for member in fleet.members) and not loading.done():
        await asyncio.sleep(_LOOKS)
    if loading.done():
        await loading
    return loading


async def _finish(loading: asyncio.Task[ModelFacts]) -> ModelFacts:
    return await loading


async def _load(
    fleet: Fleet, local: LocalWorkers, listener: ClusterListener | None, progress: Progress
) -> ModelFacts:
    fleet.attach()
    try:
        await local.load(progress)
        if fleet.model is None and listener is not None:
            listener.start()
            logger.info("waiting for a worker: %s", listener.command)
            await fleet.one_ready()
    finally:
        if listener is not None:
            listener.pause()
        fleet.detach()
    assert fleet.model is not None
    return fleet.model

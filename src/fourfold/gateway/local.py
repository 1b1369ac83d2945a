"""Everything that one process needs to answer: model, engine, tokenizer, gateway."""

from __future__ import annotations

import dataclasses

from fourfold.engine.building import EngineSetup, ModelFacts, Progress, build_engine
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.gateway import EngineClient, Gateway
from fourfold.gateway.tokenizer import Tokenizer, load_tokenizer
from fourfold.models.checkpoint.source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewaySetup:
    """What a gateway is made of."""

    engine: EngineSetup
    tokenizer: Source
    limits: GatewayLimits = GatewayLimits()
    names: tuple[str, ...] = ()
    """Further names that the model is served under."""


def make_gateway(setup: GatewaySetup, progress: Progress = lambda done, total: None) -> Gateway:
    """Loads the model into this process and builds the gateway; `Gateway.start` on a running loop
    starts it. Raises `ConfigError` and `CheckpointError`."""
    tokenizer = load_tokenizer(setup.tokenizer, dummy=setup.engine.dummy)
    engine, model = build_engine(setup.engine, progress)
    gateway = assemble(setup, engine, tokenizer, model)
    engine.on_failure = gateway.fail_soon
    return gateway


def assemble(
    setup: GatewaySetup, engine: EngineClient, tokenizer: Tokenizer, model: ModelFacts
) -> Gateway:
    """The gateway to an engine, wherever that runs."""
    return Gateway(
        engine,
        tokenizer.ending_with(model.eos_token_ids),
        setup.limits,
        model_names=tuple(dict.fromkeys((setup.engine.source.model_id, *setup.names))),
        vocabulary=model.vocabulary,
    )

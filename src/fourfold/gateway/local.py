"""Starts everything that one process needs to answer: model, engine, tokenizer, gateway."""

from __future__ import annotations

import dataclasses

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.runner import Runner
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import Source
from fourfold.models.filling import Progress
from fourfold.models.loading import LoadOptions, load_model, pages_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """What a gateway in this process is made of."""

    source: Source
    tokenizer: Source
    load: LoadOptions
    engine: EngineConfig
    limits: GatewayLimits
    names: tuple[str, ...] = ()
    """Further names that the model is served under."""


def make_gateway(options: LocalOptions, progress: Progress = lambda done, total: None) -> Gateway:
    """Loads the model and builds the gateway; `Gateway.start` on a running loop starts it."""
    model = load_model(options.source, options.load, progress)
    tokenizer = load_tokenizer(options.tokenizer, model.config.eos_token_ids)
    pages = pages_of(model, options.engine.kv_pages)
    engine = Engine(Runner(model, options.engine, pages), options.engine)
    return Gateway(
        engine,
        tokenizer,
        options.limits,
        model_names=(options.source.model_id, *options.names),
        vocabulary=model.config.vocabulary,
    )

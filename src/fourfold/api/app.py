"""Puts the edge together: routes inside, and around them, from the outside in, the count of
outcomes, the API key, and the bounds on the body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from fourfold import __version__
from fourfold.api.auth import RequireKey
from fourfold.api.cluster import cluster_routes
from fourfold.api.cluster_metrics import FleetCollector
from fourfold.api.config import ApiConfig
from fourfold.api.errors import answer_error, answer_routing_error
from fourfold.api.limits import LimitBody
from fourfold.api.metrics import CountOutcomes, RequestMetrics
from fourfold.api.routes import generation_routes
from fourfold.api.status import status_routes
from fourfold.errors import FourfoldError

if TYPE_CHECKING:
    from fourfold.gateway.fleet.fleet import Fleet
    from fourfold.gateway.gateway import Gateway


def create_app(gateway: Gateway, config: ApiConfig, fleet: Fleet | None = None) -> FastAPI:
    """The ASGI app that serves `gateway`, and shows its `fleet` of workers; it starts
    nothing and owns nothing that must be closed.

    There are no generated docs pages: the API is OpenAI's.
    """
    app = FastAPI(
        title="Fourfold",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    metrics = RequestMetrics(gateway)
    app.include_router(generation_routes(gateway, config))
    app.include_router(status_routes(gateway, metrics.registry, fleet))
    if fleet is not None:
        metrics.registry.register(FleetCollector(fleet))
        app.include_router(cluster_routes(fleet))
    app.add_exception_handler(HTTPException, answer_routing_error)
    app.add_exception_handler(FourfoldError, answer_error)
    app.add_exception_handler(Exception, answer_error)
    # The last one added is the outermost.
    app.add_middleware(LimitBody, config=config)
    if config.api_key:
        app.add_middleware(RequireKey, keys=config.api_key)
    app.add_middleware(CountOutcomes, metrics=metrics)
    return app

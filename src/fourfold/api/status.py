"""The routes that only look: models, health, readiness, metrics, version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from fourfold import __version__
from fourfold.api.errors import to_http_error
from fourfold.api.routes import check_model
from fourfold.errors import DrainingError

if TYPE_CHECKING:
    from fourfold.gateway.fleet.fleet import Fleet
    from fourfold.gateway.gateway import Gateway


def status_routes(
    gateway: Gateway, registry: CollectorRegistry, fleet: Fleet | None = None
) -> APIRouter:
    """GET /v1/models, /v1/models/{id}, /health, /ready, /metrics and /version."""
    router = APIRouter()

    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": gateway.created,
            "owned_by": "fourfold",
            "max_model_len": gateway.context_length,
        }

    @router.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model(n) for n in gateway.model_names]})

    # Names may hold slashes, as hub ids do.
    @router.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> Response:
        check_model(name, gateway)
        return JSONResponse(model(name))

    @router.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def health() -> Response:
        if gateway.failure is not None:
            return to_http_error(DrainingError(str(gateway.failure))).response()
        return JSONResponse({"status": "ok"})

    @router.api_route("/ready", methods=["GET", "HEAD"], response_model=None)
    async def ready() -> Response:
        if gateway.draining:
            reason = "the server is shutting down"
        elif not gateway.ready:
            reason = "the server has not started yet"
        elif fleet is not None and not fleet.takes_requests:
            reason = "no worker takes requests now, so they wait for one"
        else:
            return JSONResponse({"status": "ready"})
        return to_http_error(DrainingError(f"{reason}; ask again later")).response()

    @router.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(registry), headers={"content-type": content_type})

    @router.get("/version", response_model=None)
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    return router

"""The routes by which an operator sees a server's workers and gives them other roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fourfold.api.errors import HttpError
from fourfold.engine.messages import Role
from fourfold.errors import RequestError

if TYPE_CHECKING:
    from fourfold.gateway.fleet.fleet import Fleet


class RoleChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /cluster/workers/{name}."""

    role: Role


def cluster_routes(fleet: Fleet) -> APIRouter:
    """GET /cluster/workers and POST /cluster/workers/{name}."""
    router = APIRouter()

    @router.get("/cluster/workers", response_model=None)
    async def workers() -> Response:
        return JSONResponse({"object": "list", "data": msgspec.to_builtins(fleet.workers)})

    @router.post("/cluster/workers/{name:path}", response_model=None)
    async def change(name: str, request: Request) -> Response:
        try:
            asked = msgspec.json.decode(await request.body(), type=RoleChange)
        except msgspec.MsgspecError:
            known = ", ".join(Role)
            message = f'send {{"role": ROLE}}, where ROLE is one of {known}'
            raise RequestError(message, param="role") from None
        try:
            worker = fleet.set_role(name, asked.role)
        except RequestError as error:
            raise HttpError(404, str(error), param="name", code="worker_not_found") from None
        return JSONResponse(msgspec.to_builtins(worker))

    return router

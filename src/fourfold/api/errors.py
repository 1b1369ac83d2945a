"""Every failure a client can see, as OpenAI's `{"error": {"message", "type", "param", "code"}}`.

One class carries status, body and headers, because the same failure may have to leave as an HTTP
response, as an event inside a stream that has begun, or as raw bytes from a connection on which no
request was ever complete.
"""

from __future__ import annotations

import http
import math
from collections.abc import Mapping

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from fourfold.errors import (
    DeadlineError,
    DrainingError,
    FourfoldError,
    OverloadedError,
    RequestError,
)

_RETRY_WHEN_GONE = 5.0
"""Seconds after which a client of a server that drains or starts may ask again."""


class ErrorFields(msgspec.Struct, frozen=True, kw_only=True):
    """The four fields that OpenAI clients look for."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorFields


class HttpError(FourfoldError):
    """A failure with its HTTP status, its words for people and programs, and its headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type`: whose fault it is."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        """The JSON body."""
        fields = ErrorFields(message=str(self), type=self.kind, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(fields))

    def event(self) -> bytes:
        """The body as a server-sent event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"

    def response(self) -> Response:
        """The failure as a response."""
        return Response(self.body(), self.status, self.headers, "application/json")

    def raw(self) -> bytes:
        """A whole HTTP/1.1 response, for a connection that is closed after it."""
        body = self.body()
        headers = {
            **self.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def to_http_error(error: Exception) -> HttpError:
    """What a client is told of `error`; nothing of its inside when it is a bug of ours."""
    message = str(error)
    match error:
        case HttpError():
            return error
        case RequestError():
            return HttpError(400, message, param=error.param, code=error.code or "invalid_value")
        case OverloadedError():
            headers = {"retry-after": _seconds(error.retry_after)}
            return HttpError(429, message, code="server_overloaded", headers=headers)
        case DrainingError():
            headers = {"retry-after": _seconds(_RETRY_WHEN_GONE)}
            return HttpError(503, message, code="server_unavailable", headers=headers)
        case DeadlineError():
            # OpenAI's clients send again what took too long here, unless they are told not to.
            headers = {"x-should-retry": "false"}
            return HttpError(504, message, code="deadline_exceeded", headers=headers)
        case FourfoldError():
            return HttpError(500, message, code="request_failed")
    message = "the server failed through a fault of its own; try again, its log has the details"
    # The exception goes on to uvicorn, which logs it and then closes the connection.
    return HttpError(500, message, code="internal_error", headers={"connection": "close"})


def _seconds(delay: float) -> str:
    """A Retry-After value: whole seconds, never an invitation to come back at once."""
    return str(max(1, math.ceil(delay)))


async def answer_error(_: Request, error: Exception) -> Response:
    """Exception handler for whatever a route raises."""
    return to_http_error(error).response()


async def answer_routing_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the router refuses by itself: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path[:200], error.headers
    if error.status_code == 404:
        message = f"there is no route {path}; the API lies under /v1, see /v1/models"
        return HttpError(404, message, code="unknown_url", headers=headers).response()
    if error.status_code == 405:
        allowed = (headers or {}).get("Allow", "another method")
        message = f"{path} does not take {request.method}; use {allowed}"
        return HttpError(405, message, code="method_not_allowed", headers=headers).response()
    return HttpError(error.status_code, error.detail, code="http_error", headers=headers).response()

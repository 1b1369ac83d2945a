"""Bounds on a request's body, in bytes and in time.

The body is read here, whole, before the app is called: so no route ever holds resources while a
client dawdles, and every refusal is an ordinary response. A body of the allowed size fits in
memory by definition, and the schema needs all of it anyway.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.api.config import ApiConfig
from fourfold.api.errors import HttpError

_LINGER = 2.0
"""Seconds to go on discarding a refused body, so that its sender gets to read the refusal."""


class LimitBody:
    """Answers 413 for a body too large and 408 for one too slow; hands over the others whole."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._max_bytes = config.max_body_bytes
        self._timeout = config.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app with a body that is complete, or does not call it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except HttpError as error:
            await refuse_unread(error, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when the client left before its end."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if int(announced) > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._timeout):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    chunks.append(event.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._max_bytes:
                        raise self._too_large()
                    more = event.get("more_body", False)
        except TimeoutError:
            message = f"the body did not arrive within {self._timeout:g} seconds; send it again"
            raise HttpError(408, message, code="request_timeout") from None
        return b"".join(chunks)

    def _too_large(self) -> HttpError:
        message = f"the body is larger than {self._max_bytes} bytes; send a smaller request"
        return HttpError(413, message, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then what the server has to say."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse_unread(error: HttpError, receive: Receive, send: Send) -> None:
    """Answers a request whose body was not read, and ends the connection.

    Not at once: closing with bytes of the body unread would reset the connection, and with it the
    answer. So the rest of the body is discarded for a moment.
    """
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})

"""Bounds on a connection that no ASGI app can set: they hold where no request is complete yet.

uvicorn waits forever for a request's head and for a client to read its answer. This subclass gives
both a deadline, bounds the size of a head and the number of connections, and answers in OpenAI's
error form where uvicorn would send plain text. A connection always has some timer running: this
one's for the head, `LimitBody`'s for the body, the gateway's for the generation, this one's for
writing, uvicorn's for keep-alive.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fourfold.api.config import ApiConfig
from fourfold.api.errors import HttpError
from fourfold.api.metrics import PARSE_SECONDS

_UNSENT_BYTES = 1 << 17
"""That the kernel takes before any of them can be sent. Without a bound it takes megabytes, and
asks for more when a third has gone: until then a slow reader looks like one who takes nothing."""


def bounded_protocol(config: ApiConfig) -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn's `http` option, with the bounds of `config`."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"bounds": config})


class _BoundedProtocol(HttpToolsProtocol):
    bounds: ClassVar[ApiConfig]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        """Of a head on its way; within a body, of what came since its last piece."""
        self._in_body = False
        self._open_cycles: list[RequestResponseCycle] = []
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it, too
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that whatever waits here has its timer
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES
            )
        if len(self.connections) > self.bounds.max_connections:
            message = "the server holds as many connections as it may; try again shortly"
            headers = {"retry-after": "1"}
            self._refuse(HttpError(503, message, code="too_many_connections", headers=headers))
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and not self._in_body:
            self._head_bytes = 0
            self._await_head()
        self._head_bytes += len(data)
        began = time.perf_counter()
        super().data_received(data)
        if self.cycle is not None:
            state = self.cycle.scope["state"]
            state[PARSE_SECONDS] = state.get(PARSE_SECONDS, 0.0) + time.perf_counter() - began
        unfinished = self._head_timer is not None or self._in_body
        if unfinished and self._head_bytes > self.bounds.max_head_bytes:
            message = f"the headers are over {self.bounds.max_head_bytes} bytes; send fewer"
            self._refuse(HttpError(431, message, code="headers_too_large"))

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._head_bytes = 0
        self._head_done()
        super().on_headers_complete()
        cycles = (*self._open_cycles, self.cycle)
        self._open_cycles = [cycle for cycle in cycles if not cycle.response_complete]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0  # what follows the last piece of it are trailers
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_done()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self._write_done()
        super().connection_lost(exc)
        # uvicorn tells the newest request only; a pipelined one must not hide those before it.
        for cycle in self._open_cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def shutdown(self) -> None:
        if self._in_body and not self.pipeline:
            self.transport.abort()  # a request still on its way would be refused at its end
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HttpError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.bounds.header_timeout, self._head_late)

    def _head_late(self) -> None:
        if self._answering():  # a pipelined request may be late while the one before is answered
            self._await_head()
        elif self._head_bytes == 0:
            self.transport.close()
        else:
            message = f"the headers did not arrive within {self.bounds.header_timeout:g} seconds"
            self._refuse(HttpError(408, message, code="request_timeout"))

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(
            self.bounds.write_timeout, self._write_late, unread
        )

    def _write_late(self, unread: int) -> None:
        # Nothing is added meanwhile: whoever writes waits for `resume_writing`.
        if self.transport.get_write_buffer_size() < unread:
            self._await_reader()
        else:
            self.transport.abort()

    def _write_done(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: HttpError) -> None:
        """Ends the connection, with an answer unless one is already under way."""
        self._head_done()
        if self._answering():
            self.transport.abort()
        else:
            self.transport.write(error.raw())
            self.transport.close()

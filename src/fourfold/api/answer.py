"""The response that generates: one place where a request's generations are admitted and ended.

Nothing is sent before the first token is there, so that a request which fails early (refused, out
of time in the queue, broken engine) still gets its proper status. After that a failure can only be
told inside the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from fourfold.api.errors import to_http_error
from fourfold.api.following import (
    Admission,
    ClientGoneError,
    Following,
    merge,
    while_connected,
)
from fourfold.api.metrics import Outcome, RequestRecord, record_of
from fourfold.api.replies import DONE, Reply
from fourfold.errors import FourfoldError
from fourfold.gateway.generation import Delta, Generation, Usage

_DETAILED_AT_ONCE = 128
"""Tokens whose log-probabilities are told on the loop: about 10 ms with 20 likely ones each."""
_telling = ThreadPoolExecutor(1, "telling")
"""For more: one after the other, for they take time from the loop; and none waits there for others
who need a thread."""
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

logger = logging.getLogger(__name__)


class Answer(Response):
    """Admits generations, follows them and sends what they say, whole or as events."""

    def __init__(
        self,
        admissions: Sequence[Admission],
        *,
        n: int,
        reply: Callable[[Sequence[Generation]], Reply],
        stream: bool,
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        media_type = "text/event-stream" if stream else "application/json"
        super().__init__(media_type=media_type, headers=_STREAM_HEADERS if stream else None)
        del self.headers["content-length"]
        self._admissions = admissions
        self._n = n
        self._reply = reply
        self._stream = stream
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; when the client goes away at any stage, the generations are cancelled."""
        record = record_of(scope)
        answering = self._send_events if self._stream else self._send_whole
        stayed = await while_connected(receive, answering(record, _telling_when_gone(send)))
        if not stayed and record.outcome is Outcome.REFUSED:
            record.outcome = Outcome.CANCELLED

    @asynccontextmanager
    async def _follow(self, record: RequestRecord) -> AsyncIterator[Following]:
        async with Following(self._admissions, self._n) as following:
            outcome = Outcome.CANCELLED
            try:
                yield following
                outcome = Outcome.FINISHED
            except ClientGoneError:
                raise
            except Exception:
                outcome = Outcome.FAILED
                raise
            finally:
                record.ended(following.usage, outcome)

    async def _send_whole(self, record: RequestRecord, send: Send) -> None:
        deltas: list[Delta] = []
        async with self._follow(record) as following:
            reply = self._reply(following.generations)
            async for batch in following:
                record.tokens_came(batch)
                deltas += batch
        await record.writing(self._write_whole(reply, deltas, following.usage, send))

    async def _write_whole(
        self, reply: Reply, deltas: Sequence[Delta], usage: Usage, send: Send
    ) -> None:
        body = await _made(reply, deltas, lambda: reply.whole(merge(deltas), usage))
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await _send_body(send, body, more=False)

    async def _send_events(self, record: RequestRecord, send: Send) -> None:
        started = False
        try:
            async with self._follow(record) as following:
                reply = self._reply(following.generations)
                async for batch in following:
                    record.tokens_came(batch)
                    first, started = not started, True
                    counts = following.usage if self._continuous_usage else None
                    await record.writing(self._write_events(reply, batch, counts, send, first))
        except Exception as error:
            if not started or isinstance(error, ClientGoneError):
                raise
            if not isinstance(error, FourfoldError):
                logger.exception("A stream failed after it had begun")
            await record.writing(_send_body(send, to_http_error(error).event(), more=False))
            return
        usage = reply.usage_event(following.usage) if self._include_usage else b""
        await record.writing(_send_body(send, usage + DONE, more=False))

    async def _write_events(
        self, reply: Reply, batch: Sequence[Delta], counts: Usage | None, send: Send, first: bool
    ) -> None:
        if first:
            await self._start(send)
        made = _made(reply, batch, lambda: b"".join(reply.events(each, counts) for each in batch))
        if events := await made:
            await _send_body(send, events, more=True)

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


async def _made(reply: Reply, deltas: Sequence[Delta], make: Callable[[], bytes]) -> bytes:
    """What `make` tells of the deltas. Log-probabilities of many tokens take seconds, in which
    everybody's tokens, and the heartbeats of all workers, would wait for this loop."""
    if reply.detailed(deltas) <= _DETAILED_AT_ONCE:
        return make()
    return await asyncio.get_running_loop().run_in_executor(_telling, make)


def _telling_when_gone(send: Send) -> Send:
    """`send`, with one error for the moment in which a connection is closed but not yet lost."""

    async def tell(message: Message) -> None:
        try:
            await send(message)
        except (OSError, RuntimeError) as error:
            raise ClientGoneError from error

    return tell


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})

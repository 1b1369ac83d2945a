"""Follows the generations of one request to their end, or ends them when nobody listens any more.

A request may hold several generations (one for each prompt) of several samples each. `Following`
merges them into one stream of choices and hands over at once whatever has arrived, so that a slow
client gets fewer, larger chunks rather than a growing queue of small ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from starlette.types import Receive

from fourfold.engine.messages import FinishReason
from fourfold.errors import DrainingError, RequestFailedError
from fourfold.gateway.generation import Delta, Generation, Usage

_NOTICE = 1.0
"""Seconds within which the server hears of a connection on which it could not write."""

Admission = Callable[[], Awaitable[Generation]]


class Following:
    """The generations of one request, admitted on entry and surely ended on exit.

    Iterating yields batches of deltas whose `index` is prompt * n + sample, at most one for each
    choice, and raises what a generation raised.
    """

    def __init__(self, admissions: Sequence[Admission], n: int) -> None:
        self._admissions = admissions
        self._n = n
        self._news = asyncio.Event()
        self.generations: list[Generation] = []

    @property
    def usage(self) -> Usage:
        """Token counts so far, over all prompts."""
        each = [generation.usage for generation in self.generations]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in each),
            cached_tokens=sum(usage.cached_tokens for usage in each),
            completion_tokens=sum(usage.completion_tokens for usage in each),
        )

    async def __aenter__(self) -> Self:
        try:
            for admit in self._admissions:
                self.generations.append(await admit())
        except BaseException:
            self._cancel()
            raise
        for generation in self.generations:
            generation.listen(self._news.set)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancel()

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        unfinished = len(self.generations) * self._n
        while unfinished:
            await self._news.wait()
            self._news.clear()
            arrived, failure = self._take()
            if arrived:
                unfinished -= sum(delta.finish is not None for delta in arrived)
                yield merge(arrived)
            if failure is not None:
                raise failure

    def _take(self) -> tuple[list[Delta], Exception | None]:
        """What has come of all choices, and why one of them ended before its end."""
        arrived: list[Delta] = []
        failure: Exception | None = None
        for prompt, generation in enumerate(self.generations):
            deltas, failed = generation.take()
            failure = failure or failed
            for delta in deltas:
                if delta.finish is FinishReason.CANCELLED:
                    message = "the server ended the request to shut down; send it again"
                    failure = failure or DrainingError(message)
                elif delta.finish is FinishReason.FAILED:
                    message = "the request could not be finished; send it again"
                    failure = failure or RequestFailedError(message)
                elif prompt == 0:
                    arrived.append(delta)
                else:
                    choice = prompt * self._n + delta.index
                    arrived.append(msgspec.structs.replace(delta, index=choice))
        return arrived, failure

    def _cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta for each choice, with everything the given ones say of it, in index order."""
    deltas = list(deltas)
    if len(deltas) == 1:
        return deltas
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.index, []).append(delta)
    return [
        parts[0]
        if len(parts) == 1
        else Delta(
            index=index,
            text="".join(part.text for part in parts),
            tokens=tuple(token for part in parts for token in part.tokens),
            finish=parts[-1].finish,
        )
        for index, parts in sorted(by_choice.items())
    ]


class ClientGoneError(Exception):
    """Nothing more can be sent to the client."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work`, and cancels it when the client goes away first; whether it ran to its end."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    except ClientGoneError:
        await asyncio.wait((leaving,), timeout=_NOTICE)
        if not leaving.done():
            raise
        return False
    finally:
        await _end((working, leaving))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels what still runs and waits for it; results and errors were looked at before."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

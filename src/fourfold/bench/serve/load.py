"""When requests are sent: arrival times, and the two loops that keep to them.

In the open loop each request leaves at its time whatever became of those before it, and one that
leaves late is still measured from when it was due. In the closed loop a client's next request
waits for its last, so a slow server is asked less: use it for throughput at a given batch, not
for latency under traffic.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from fourfold.bench.serve.measure import Outcome

Ask = Callable[[bytes, float | None], Awaitable[Outcome]]
"""Sends a request body that is due at a `time.perf_counter()` (None: now)."""


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds after the start at which `count` requests are due, the first at 0.

    The gaps are gamma distributed with mean 1 / `rate` and coefficient of variation
    1 / sqrt(`burstiness`); burstiness 1 makes them a Poisson process.
    """
    if math.isinf(rate):
        return [0.0] * count
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + rng.gammavariate(burstiness, 1.0 / (rate * burstiness)))
    return times


async def open_loop(
    ask: Ask,
    bodies: Sequence[bytes],
    times: Sequence[float],
    record: Callable[[Outcome], None],
    enough: asyncio.Event | None = None,
) -> None:
    """Sends each body at its time from now; passes outcomes to `record` as requests end. None is
    sent any more once `enough` is set; those that were are waited for."""

    async def one(body: bytes, due: float) -> None:
        record(await ask(body, due))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body, offset in zip(bodies, times, strict=True):
            due = start + offset
            await _sleep_until(due)
            if enough is not None and enough.is_set():
                break
            group.create_task(one(body, due))


async def closed_loop(
    ask: Ask, bodies: Sequence[bytes], concurrency: int, record: Callable[[Outcome], None]
) -> None:
    """Sends all bodies with `concurrency` under way at a time; passes outcomes to `record`."""

    async def client(remaining: Iterator[bytes]) -> None:
        for body in remaining:
            record(await ask(body, None))

    remaining = iter(bodies)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(client(remaining))


async def unless(stop: asyncio.Event, work: Awaitable[None]) -> None:
    """Runs `work` to its end, or cancels it when `stop` is set."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.wait({task, stopped})


async def _sleep_until(due: float) -> None:
    # At least one turn of the loop, so that a schedule already late cannot keep answers unread;
    # several, because a timer of the loop may fire up to a millisecond early.
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    while (remaining := due - time.perf_counter()) > 0:
        await asyncio.sleep(remaining)

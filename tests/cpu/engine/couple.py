"""Two engines in one process that share requests over a real transport, and the gateway's part."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import msgspec
import torch

from fourfold.engine.engine import Engine
from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    Granted,
    HandoverNews,
    Moved,
    Stage,
    Submit,
    TokenOutput,
)
from fourfold.transport.config import TransportConfig, TransportPath
from fourfold.transport.identity import Identity
from fourfold.transport.node import Node
from fourfold.transport.peer import DevicePages

PATIENCE = 60.0


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@dataclasses.dataclass
class Couple:
    """A prefilling and a decoding engine. `outputs` are by (request, sample), as they came."""

    first: Engine
    second: Engine
    first_node: Node
    second_node: Node
    outputs: dict[tuple[int, int], list[TokenOutput]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    moved: dict[int, list[str | None]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    granted: dict[int, int] = dataclasses.field(default_factory=dict)
    requests: dict[int, Submit] = dataclasses.field(default_factory=dict)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def start(self) -> None:
        self.first.start(self.from_first, self.told_by_first)
        self.second.start(self.from_second, self.told_by_second)

    def submit(self, request: Submit) -> None:
        self.requests[request.request_id] = request
        self.second.submit(
            msgspec.structs.replace(request, stage=Stage.DECODE, peer=self.first_node.peer)
        )
        self.first.submit(
            msgspec.structs.replace(request, stage=Stage.PREFILL, peer=self.second_node.peer)
        )

    def abort(self, request_id: int) -> None:
        for engine in (self.first, self.second):
            engine.abort(Abort(request_id=request_id))

    def from_first(self, outputs: list[TokenOutput]) -> None:
        self.take(outputs)
        for output in outputs:
            if output.token is None:
                continue
            if output.finish is not None and self.requests[output.request_id].n == 1:
                self.second.abort(Abort(request_id=output.request_id))
            else:
                self.second.relay(
                    Continue(request_id=output.request_id, token=output.token, finish=output.finish)
                )

    def from_second(self, outputs: list[TokenOutput]) -> None:
        # What ends a part that is not needed is no news of the sample.
        self.take([o for o in outputs if o.finish is not FinishReason.CANCELLED])

    def told_by_first(self, news: HandoverNews) -> None:
        assert isinstance(news, Moved)
        self.note(news)

    def told_by_second(self, news: HandoverNews) -> None:
        if isinstance(news, Granted):
            self.granted[news.request_id] = news.found
            self.first.relay(news)
        else:
            self.note(news)

    def note(self, news: Moved) -> None:
        with self.changed:
            self.moved[news.request_id].append(news.error)
            self.changed.notify_all()

    def take(self, outputs: list[TokenOutput]) -> None:
        with self.changed:
            for output in outputs:
                self.outputs[output.request_id, output.index].append(output)
            self.changed.notify_all()

    def finished(self, request: Submit) -> bool:
        return all(
            any(output.finish is not None for output in self.outputs[request.request_id, index])
            for index in range(request.n)
        )

    def answers(self, *requests: Submit) -> list[list[list[int]]]:
        """The tokens of every sample of these requests, which are submitted together."""
        for request in requests:
            self.submit(request)
        with self.changed:
            done = self.changed.wait_for(lambda: all(map(self.finished, requests)), PATIENCE)
        assert done, f"no answer; moved: {dict(self.moved)}"
        return [
            [self.tokens(request.request_id, index) for index in range(request.n)]
            for request in requests
        ]

    def tokens(self, request_id: int, index: int) -> list[int]:
        return [o.token for o in self.outputs[request_id, index] if o.token is not None]

    def wait_until_free(self) -> None:
        """Until neither engine holds a page."""
        until = time.monotonic() + PATIENCE
        engines = (self.first, self.second)
        while any(e.scheduler.pool.in_use or not e.scheduler.idle for e in engines):
            assert time.monotonic() < until, "pages are still held"
            time.sleep(0.005)


@contextlib.contextmanager
def couple(
    first: Engine,
    second: Engine,
    devices: tuple[DevicePages | None, ...] = (),
    path: TransportPath = TransportPath.AUTO,
) -> Iterator[Couple]:
    """`devices`: what the engines say of their memory instead of the truth."""
    nodes = []
    truth = (first.device_pages, second.device_pages)
    for epoch, engine in enumerate((first, second), 1):
        identity = Identity(
            name=f"w{epoch}",
            epoch=epoch,
            model="m",
            pages=engine.page_format,
            device=(devices or truth)[epoch - 1],
        )
        nodes.append(Node(identity, TransportConfig(path=path)))
        engine.connect(nodes[-1])
    pair = Couple(first, second, *nodes)
    pair.start()
    try:
        yield pair
    finally:
        for engine in (first, second):
            engine.stop()
        for node in nodes:
            node.close()

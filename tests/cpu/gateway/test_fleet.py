"""A fleet and what its workers say, over real sockets: who is taken, watched, used, let go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.channel import (
    Alive,
    Channel,
    FromEngine,
    Hello,
    Leaving,
    Load,
    News,
    Ready,
    Refused,
    Stop,
    ToEngine,
    encode,
)
from fourfold.engine.messages import (
    Abort,
    Continue,
    EngineStats,
    FinishReason,
    Granted,
    HandoverNews,
    Moved,
    Role,
    SamplingParams,
    Stage,
    Submit,
    TokenOutput,
)
from fourfold.errors import RequestError
from fourfold.gateway.fleet import members
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.transport.config import TransportConfig
from fourfold.transport.format import PageFormat
from fourfold.transport.peer import Peer

PAGES = PageFormat(
    layers=2,
    kv_heads=2,
    head_width=8,
    page_tokens=64,
    code="float32",
    open_code="float32",
    record_bytes=4096,
)
Message = TypeVar("Message")
PATIENCE = 20.0


class Scripted:
    """The worker's end of a connection, which says what a test has it say."""

    def __init__(
        self, fleet: Fleet, name: str, role: Role = Role.BOTH, *, local: bool = False
    ) -> None:
        ours, self.socket = socket.socketpair()
        self.member = fleet.add(ours, local=local)
        self.socket.setblocking(False)
        self.channel: Channel[ToEngine] = Channel(self.socket, ToEngine)
        self.heard: list[ToEngine] = []
        self.stats = EngineStats(pages_total=1000)
        self.name = name
        self.say(Hello(name, role, 77))

    def say(self, message: FromEngine) -> None:
        self.channel.send(message)

    async def hear(self, kind: type[Message]) -> Message:
        """The next message of a kind; others before it are dropped."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while self.heard:
                message = self.heard.pop(0)
                if isinstance(message, kind):
                    return message
            assert time.monotonic() < deadline, f"no {kind.__name__} came"
            await asyncio.sleep(0.002)
            with contextlib.suppress(BlockingIOError):
                self.heard += self.channel.receive()

    async def be_ready(self, model: str = "one", **fields: Any) -> Load:
        """Loads, and says so."""
        load = await self.hear(Load)
        usual = {"max_context": 1024, "stats": self.stats}
        self.say(
            Ready(
                model=ModelFacts(
                    vocabulary=320,
                    eos_token_ids=(2,),
                    checkpoint=model,
                    fingerprint=f"{model} float32",
                ),
                peer=Peer(name=self.name, epoch=5, host="127.0.0.1", port=9, pages=PAGES),
                device="cpu",
                **(usual | fields),
            )
        )
        return load

    def tell(self, *outputs: TokenOutput, handover: tuple[HandoverNews, ...] = ()) -> None:
        self.say(News(list(outputs), self.stats, time.perf_counter(), list(handover)))

    def answer(self, part: Submit, *tokens: int, ends: bool = True, index: int = 0) -> None:
        """Tokens of a part's sample, the last of which ends it."""
        for place, token in enumerate(tokens, 1):
            finish = FinishReason.STOP if ends and place == len(tokens) else None
            self.tell(
                TokenOutput(request_id=part.request_id, index=index, token=token, finish=finish)
            )


class Running:
    """A started fleet, and what it said."""

    def __init__(self, **config: Any) -> None:
        source = Source(SourceKind.DIRECTORY, Path("/nowhere"), "model")
        drain = config.pop("drain_timeout", 30.0)
        setup = EngineSetup(source=source)
        config = {"worker_timeout": 60.0} | config  # scripted workers are silent unless told to
        self.fleet = Fleet(setup, FleetConfig(**config), TransportConfig(), drain)
        self.outputs: list[TokenOutput] = []
        self.scripted: list[Scripted] = []

    async def worker(self, name: str, role: Role = Role.BOTH, **fields: Any) -> Scripted:
        """A worker that takes requests."""
        scripted = Scripted(self.fleet, name, role)
        self.scripted.append(scripted)
        await scripted.be_ready(**fields)
        await eventually(lambda: scripted.member.takes_requests)
        return scripted

    def ask(self, number: int, tokens: int = 500, n: int = 1) -> None:
        sampling = SamplingParams(max_tokens=9)
        prompt = tuple(range(number, number + tokens))
        self.fleet.submit(Submit(request_id=number, prompt_ids=prompt, sampling=sampling, n=n))

    def tokens(self, number: int, index: int = 0) -> list[int | None]:
        told = [o for o in self.outputs if (o.request_id, o.index) == (number, index)]
        assert sum(output.finish is not None for output in told) <= 1
        return [output.token for output in told]

    def ended(self, number: int) -> bool:
        return any(o.request_id == number and o.finish is not None for o in self.outputs)


@contextlib.asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Running]:
    run = Running(**config)
    run.fleet.start(lambda outputs, since=None: run.outputs.extend(outputs))
    yield run
    await asyncio.to_thread(run.fleet.stop)
    assert not run.fleet.members


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def go(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_a_request_waits_for_a_worker_and_has_its_answer() -> None:
    async def main() -> None:
        async with running() as run:
            run.ask(1)
            assert run.fleet.parked == 1
            worker = await run.worker("a", max_context=1024)
            assert run.fleet.max_context == 1024
            part = await worker.hear(Submit)
            assert (part.stage, part.generated, part.prompt_ids) == (
                Stage.WHOLE,
                (),
                tuple(range(1, 501)),
            )
            assert worker.member.burden.tokens == 500
            worker.answer(part, 7, 8)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7, 8]
            assert worker.member.burden == members.Burden(samples=0, pages=0, tokens=0)
            run.ask(1000, tokens=2000)
            assert run.fleet.parked == 1, "nobody here can hold it"

    go(main)


def test_a_closed_connection_sends_its_requests_elsewhere() -> None:
    async def main() -> None:
        async with running() as run:
            first = await run.worker("a")
            run.ask(1)
            part = await first.hear(Submit)
            first.answer(part, 7, 8, ends=False)
            await eventually(lambda: len(run.tokens(1)) == 2)
            second = await run.worker("b")
            first.socket.close()
            again = await second.hear(Submit)
            assert (again.generated, again.index, again.n) == ((7, 8), 0, 1)
            assert again.request_id != part.request_id
            second.answer(again, 9)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7, 8, 9]
            assert run.fleet.counts.lost == 1

    go(main)


def test_a_silent_worker_is_dead_and_its_late_words_are_not_heard() -> None:
    async def main() -> None:
        async with running(worker_timeout=1.0) as run:
            silent = await run.worker("a")
            run.ask(1)
            part = await silent.hear(Submit)
            talking = await run.worker("b")
            deadline = time.monotonic() + PATIENCE
            while silent.member.state is not members.State.GONE:
                assert time.monotonic() < deadline
                talking.tell()
                await asyncio.sleep(0.05)
            assert talking.member.takes_requests
            with contextlib.suppress(OSError):
                silent.answer(part, 99)
            again = await talking.hear(Submit)
            talking.answer(again, 7)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7]

    go(main)


def test_a_gateway_that_slept_does_not_take_its_workers_for_dead() -> None:
    async def main() -> None:
        async with running(worker_timeout=1.0) as run:
            worker = await run.worker("a")
            time.sleep(2.0)  # the loop stands still, and hears nobody
            worker.tell()
            await worker.hear(Alive)
            await worker.hear(Alive)
            assert worker.member.takes_requests

    go(main)


def test_silence_is_no_end_of_a_gateway_on_the_same_machine() -> None:
    """Whose loop may be busy; its end would be that of the socket."""

    async def main() -> None:
        async with running(worker_timeout=2.0) as run:
            timeouts = []
            for local in (True, False):
                worker = Scripted(run.fleet, f"local {local}", local=local)
                timeouts.append((await worker.hear(Load)).timeout)
            assert timeouts == [None, 2.0]

    go(main)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 64, b"\0\0\0\5hello, worker", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_garbage_closes_its_connection_alone(junk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running() as run:
            good, bad = await run.worker("good"), await run.worker("bad")
            with caplog.at_level(logging.WARNING):
                bad.socket.sendall(junk)
                await eventually(lambda: bad.member.state is members.State.GONE)
            assert "bad" in caplog.text
            assert "no message of ours" in caplog.text
            run.ask(1)
            good.answer(await good.hear(Submit), 7)
            await eventually(lambda: run.ended(1))

    go(main)


def test_a_second_worker_of_a_name_may_ask_again_later() -> None:
    async def main() -> None:
        async with running() as run:
            first = await run.worker("a")
            second = Scripted(run.fleet, "a")
            refused = await second.hear(Refused)
            assert refused.again
            assert "named a is here already" in refused.message
            assert first.member.takes_requests

    go(main)


def test_a_name_of_a_worker_that_was_started_here_is_nobody_elses() -> None:
    async def main() -> None:
        async with running() as run:
            run.fleet.reserved = frozenset({"both-0"})
            stranger = Scripted(run.fleet, "both-0")
            refused = await stranger.hear(Refused)
            assert not refused.again, "while it is started again the name is not free"
            assert "--name" in refused.message
            own = Scripted(run.fleet, "both-0", local=True)
            await own.hear(Load)

    go(main)


def test_the_first_worker_too_must_have_what_is_served() -> None:
    async def main() -> None:
        async with running() as run:
            run.fleet.checkpoint = "one"
            other = Scripted(run.fleet, "a")
            await other.be_ready("two")
            refused = await other.hear(Refused)
            assert not refused.again
            assert "serves the model two, the gateway one" in refused.message
            assert run.fleet.model is None
            await run.worker("b", model="one")

    go(main)


def test_a_worker_with_another_model_is_refused_with_both_values() -> None:
    async def main() -> None:
        async with running() as run:
            await run.worker("a", model="one")
            other = Scripted(run.fleet, "b")
            await other.be_ready("two")
            refused = await other.hear(Refused)
            assert not refused.again
            assert "serves the model two" in refused.message
            assert "the other one one" in refused.message

    go(main)


def test_a_worker_that_leaves_finishes_and_gets_nothing_new() -> None:
    async def main() -> None:
        async with running() as run:
            leaver = await run.worker("a")
            run.ask(1)
            part = await leaver.hear(Submit)
            leaver.say(Leaving())
            await eventually(lambda: leaver.member.state is members.State.LEAVING)
            other = await run.worker("b")
            run.ask(1000)
            await other.hear(Submit)
            leaver.answer(part, 7)
            await leaver.hear(Stop)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7]
            assert run.fleet.counts.lost == 0

    go(main)


def test_what_a_leaving_worker_does_not_finish_in_time_goes_on_elsewhere() -> None:
    async def main() -> None:
        async with running(drain_timeout=0.1, max_attempts=1) as run:
            leaver = await run.worker("a")
            run.ask(1)
            part = await leaver.hear(Submit)
            leaver.answer(part, 7, ends=False)
            await eventually(lambda: run.tokens(1) == [7])
            leaver.say(Leaving())
            await leaver.hear(Stop)
            other = await run.worker("b")
            again = await other.hear(Submit)
            assert again.generated == (7,)
            other.answer(again, 8)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7, 8]

    go(main)


async def cut(run: Running) -> tuple[Scripted, Scripted, Submit, Submit]:
    """A request under way between two workers."""
    prefill = await run.worker("p", Role.PREFILL)
    decode = await run.worker("d", Role.DECODE)
    run.ask(1, n=2)
    return prefill, decode, await prefill.hear(Submit), await decode.hear(Submit)


def test_a_request_cut_in_two() -> None:
    async def main() -> None:
        async with running() as run:
            prefill, decode, prompt, answer = await cut(run)
            assert (prompt.stage, answer.stage) == (Stage.PREFILL, Stage.DECODE)
            part = prompt.request_id
            assert part == answer.request_id
            assert prompt.peer is not None
            assert answer.peer is not None
            assert (prompt.peer.name, answer.peer.name) == ("d", "p")
            assert prefill.member.burden.tokens == 500
            assert decode.member.burden.samples == 2
            decode.tell(handover=(Granted(request_id=part, found=3),))
            assert await prefill.hear(Granted) == Granted(request_id=part, found=3)
            prefill.answer(prompt, 7, ends=False)
            assert await decode.hear(Continue) == Continue(request_id=part, token=7)
            assert run.tokens(1) == [7], "the first token waits for no pages"
            prefill.tell(handover=(Moved(request_id=part),))
            await eventually(lambda: prefill.member.idle)
            prefill.socket.close()
            await eventually(lambda: prefill.member.state is members.State.GONE)
            decode.answer(answer, 8, 9)
            decode.answer(answer, 5, index=1)
            await eventually(lambda: len(run.outputs) == 4)
            assert (run.tokens(1), run.tokens(1, 1)) == ([7, 8, 9], [5])
            assert run.fleet.counts.cut == 1
            assert run.fleet.counts.lost == 0

    go(main)


def test_pages_that_cannot_be_moved_are_not_sent_that_way_again() -> None:
    async def main() -> None:
        async with running() as run:
            prefill, decode, prompt, _ = await cut(run)
            prefill.tell(handover=(Moved(request_id=prompt.request_id, error="no route"),))
            for worker in (prefill, decode):
                assert (await worker.hear(Abort)).request_id == prompt.request_id
            whole = await decode.hear(Submit)
            assert (whole.stage, whole.n) == (Stage.WHOLE, 2)
            assert (run.fleet.counts.lost, run.fleet.counts.unmoved) == (1, 1)

    go(main)


def test_pages_that_neither_come_nor_fail_are_not_waited_for() -> None:
    async def main() -> None:
        async with running(pages_timeout=0.2) as run:
            first, second, prompt, _ = await cut(run)
            second.tell(handover=(Granted(request_id=prompt.request_id),))
            await first.hear(Granted)
            first.answer(prompt, 7, ends=False)
            await second.hear(Continue)
            for worker in (first, second):
                gone = await worker.hear(Abort)
                assert gone.request_id == prompt.request_id
            again = await second.hear(Submit)
            assert (again.stage, again.generated) == (Stage.WHOLE, (7,))
            assert again.request_id != prompt.request_id

    go(main)


def test_pages_that_a_request_which_has_failed_waited_for_count_once() -> None:
    """Two samples wait at once, and the first that is given up ends their request."""

    async def main() -> None:
        async with running(pages_timeout=0.2, max_attempts=1, drain_timeout=0.1) as run:
            prefill, decode, prompt, _ = await cut(run)
            others = [await run.worker(name, Role.DECODE) for name in ("e", "f")]
            prefill.answer(prompt, 7, ends=False)
            await eventually(lambda: run.tokens(1) == [7])
            decode.say(Leaving())
            for other in others:
                part = (await other.hear(Submit)).request_id
                other.tell(handover=(Granted(request_id=part),))
            for index, token in enumerate((8, 5)):
                prefill.answer(await prefill.hear(Submit), token, ends=False, index=index)
            await eventually(lambda: run.ended(1))
            assert run.outputs[-1].finish is FinishReason.FAILED
            counts = run.fleet.counts
            assert (counts.lost, counts.unmoved) == (2, 1)

    go(main)


def test_an_abort_reaches_both_workers() -> None:
    async def main() -> None:
        async with running() as run:
            prefill, decode, prompt, _ = await cut(run)
            run.fleet.abort(Abort(request_id=1, reason=FinishReason.CANCELLED))
            for worker in (prefill, decode):
                abort = await worker.hear(Abort)
                assert (abort.request_id, abort.index) == (prompt.request_id, None)
                assert worker.member.idle

    go(main)


def test_a_new_role_is_for_new_work_and_outlives_the_connection() -> None:
    async def main() -> None:
        async with running() as run:
            first = await run.worker("a", Role.PREFILL)
            second = await run.worker("b", Role.PREFILL)
            assert run.fleet.set_role("b", Role.DECODE).role is Role.DECODE
            run.ask(1)
            assert (await first.hear(Submit)).stage is Stage.PREFILL
            assert (await second.hear(Submit)).stage is Stage.DECODE
            second.socket.close()
            await eventually(lambda: second.member.state is members.State.GONE)
            again = await run.worker("b", Role.PREFILL)
            assert again.member.role is Role.DECODE
            with pytest.raises(RequestError, match="no worker 'c'; the workers are a, b"):
                run.fleet.set_role("c", Role.BOTH)

    go(main)


def test_numbers_are_those_of_all_workers_and_never_shrink() -> None:
    async def main() -> None:
        async with running() as run:
            first, second = await run.worker("a"), await run.worker("b")
            first.stats = EngineStats(pages_total=1000, pages_in_use=4, steps=5, prompt_tokens=9)
            second.stats = EngineStats(pages_total=1000, pages_in_use=3, steps=2)
            first.tell()
            second.tell()
            await eventually(lambda: run.fleet.stats.steps == 7)
            assert (run.fleet.stats.pages_total, run.fleet.stats.pages_in_use) == (2000, 7)
            first.socket.close()
            await eventually(lambda: run.fleet.stats.pages_total == 1000)
            assert (run.fleet.stats.steps, run.fleet.stats.prompt_tokens) == (7, 9)
            again = await run.worker("a", stats=first.stats)
            assert run.fleet.stats.steps == 7, "what it counted before is counted once"
            again.stats = EngineStats(pages_total=1000, steps=6, prompt_tokens=9)
            again.tell()
            await eventually(lambda: run.fleet.stats.steps == 8)

    go(main)


def test_rates_are_measured_where_steps_show_them() -> None:
    async def main() -> None:
        async with running() as run:
            worker = await run.worker("a")
            worker.stats = EngineStats(pages_total=9, prompt_tokens=500, step_seconds=0.5)
            worker.tell()
            await eventually(lambda: worker.member.prompt_rate is not None)
            assert worker.member.prompt_rate == 1000
            worker.stats = EngineStats(
                pages_total=9, prompt_tokens=500, generated_tokens=40, step_seconds=0.9
            )
            worker.tell()
            await eventually(lambda: worker.member.token_rate is not None)
            assert worker.member.token_rate == pytest.approx(100)
            assert worker.member.prompt_rate == 1000

    go(main)


def test_a_worker_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_MOST_UNSENT", 1 << 20)

    async def main() -> None:
        async with running() as run:
            deaf = await run.worker("a", max_context=10**6)
            for number in range(1, 20):
                run.ask(number, tokens=200_000)
            await eventually(lambda: deaf.member.state is members.State.GONE)
            assert run.fleet.parked == 19

    go(main)


def test_what_waits_for_a_slow_worker_is_not_copied_for_each_bit_it_reads() -> None:
    """The loop serves everybody else meanwhile."""

    async def main() -> None:
        async with running() as run:
            slow = await run.worker("a")
            message = Refused("x" * 1_000_000)
            for _ in range(16):
                slow.member.send(message)
            await asyncio.sleep(0.01)
            unread = 16 * len(encode(message))
            tracemalloc.start()
            deadline = time.monotonic() + PATIENCE
            while unread > 0:
                assert time.monotonic() < deadline
                with contextlib.suppress(BlockingIOError):
                    unread -= len(slow.socket.recv(1 << 16))
                await asyncio.sleep(0)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert most < 20_000_000

    go(main)


def test_what_cannot_be_dealt_with_leaves_no_gap_in_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with running() as run:
            first = await run.worker("a")
            run.ask(1)
            part = await first.hear(Submit)
            first.answer(part, 7, ends=False)
            await eventually(lambda: run.tokens(1) == [7])
            second = await run.worker("b")
            with monkeypatch.context() as patch:

                def fail(number: int) -> None:
                    raise RuntimeError("a mistake of ours")

                patch.setattr(run.fleet._dispatcher, "flight", fail)
                first.answer(part, 8, ends=False)
                await eventually(lambda: first.member.state is members.State.GONE)
            again = await second.hear(Submit)
            assert again.generated == (7,)
            second.answer(again, 8)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7, 8]

    go(main)


def test_a_request_outlives_any_number_of_workers_that_die_together() -> None:
    async def main() -> None:
        async with running(max_attempts=3) as run:
            dying = [await run.worker(f"dies {number}") for number in range(6)]
            run.ask(1)
            last = await run.worker("z")
            for worker in dying:
                worker.socket.close()
            await eventually(lambda: len(run.fleet.members) == 1)
            assert not run.ended(1)
            last.answer(await last.hear(Submit), 7)
            await eventually(lambda: run.ended(1))
            assert run.tokens(1) == [7]

    go(main)

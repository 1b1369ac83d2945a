"""One engine computes prompts, another answers; the answers are those of one engine alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import msgspec
import pytest
import torch

from fourfold.engine.engine import Engine
from fourfold.engine.handover import Handover, sending
from fourfold.engine.handover.landing import HostLanding
from fourfold.engine.handover.pulling import PullLanding
from fourfold.engine.messages import Abort, FinishReason, Granted, SamplingParams, Stage, Submit
from fourfold.engine.runner import Launched
from fourfold.engine.scheduler import StepPlan
from fourfold.engine.sequence import Sequence as Sample
from fourfold.kernels import device_memory
from fourfold.models.decoder import Decoder
from fourfold.models.precision import PageFormat
from fourfold.transport.config import TransportPath
from fourfold.transport.peer import DeviceMemory, DevicePages, Peer
from fourfold.transport.pieces import Part
from fourfold.transport.stats import DEVICE_MEMORY
from tests.cpu.driving import load_tiny, make_engine, run, submit, tokens
from tests.cpu.engine.couple import Couple, couple, prompt_of, wait_until

Devices = tuple[DevicePages | None, ...]
LENGTHS = (1, 2, 63, 64, 65, 128, 130, 300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
DRAWN = SamplingParams(max_tokens=14, temperature=1.0, seed=5, presence_penalty=0.5)


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe-wide"))


def alone(engine: Engine, *requests: Submit) -> list[list[list[int]]]:
    news = run(engine, requests)
    return [
        [tokens(news[request.request_id, index]) for index in range(request.n)]
        for request in requests
    ]


@pytest.mark.parametrize("kv_pages", [PageFormat.FLOAT, PageFormat.INT8])
@pytest.mark.parametrize("step_tokens", [70, 400])
def test_answers_are_those_of_one_engine(
    model: Decoder, kv_pages: PageFormat, step_tokens: int
) -> None:
    options = {"max_running": 6, "step_tokens": step_tokens + 64, "kv_pages": kv_pages}
    requests = [
        submit(number, prompt_of(length, length), DRAWN if number % 2 else GREEDY)
        for number, length in enumerate(LENGTHS)
    ]
    wanted = alone(make_engine(model, **options), *requests)
    with couple(make_engine(model, **options), make_engine(model, **options)) as pair:
        assert pair.answers(*requests) == wanted
        pair.wait_until_free()
        assert all(news == [None, None] for news in pair.moved.values())
        assert not any(pair.granted.values())
        again = [msgspec.structs.replace(r, request_id=100 + r.request_id) for r in requests]
        assert pair.answers(*again) == wanted
        found = [pair.granted[request.request_id] for request in again]
        assert found == [(length - 1) // 64 for length in LENGTHS]
        pair.wait_until_free()


@pytest.mark.parametrize("kv_pages", [PageFormat.FLOAT, PageFormat.INT8])
def test_a_last_token_that_is_a_chunk_of_its_own_is_sent_too(
    model: Decoder, kv_pages: PageFormat
) -> None:
    options = {"max_running": 6, "step_tokens": 128, "kv_pages": kv_pages}
    request = submit(1, prompt_of(129), GREEDY)
    wanted = alone(make_engine(model, **options), request)
    with couple(make_engine(model, **options), make_engine(model, **options)) as pair:
        assert pair.answers(request) == wanted
        pair.wait_until_free()


@pytest.mark.parametrize("kv_pages", [PageFormat.FLOAT, PageFormat.INT8])
def test_what_came_altered_spoils_nobody_who_has_the_pages_next(
    model: Decoder, kv_pages: PageFormat
) -> None:
    options = {"pages": 5, "kv_pages": kv_pages, "max_running": 2, "prefix_cache": False}
    request = submit(1, prompt_of(200), GREEDY)
    wanted = alone(make_engine(model, **options), request)
    with couple(make_engine(model, **options), make_engine(model, **options)) as pair:
        peer = pair.first_node.peer
        lost = msgspec.structs.replace(request, request_id=2, stage=Stage.DECODE, peer=peer)
        pair.second.submit(lost)
        wait_until(lambda: 2 in pair.granted)
        handover = pair.second._handover
        assert handover is not None
        landing = handover._landings[2]
        runs = [(Part.PAGES, landing.pages)] + [(Part.OPEN, 1)] * landing.open
        for layer, (part, count) in itertools.product(range(landing.layers), runs):
            for piece in landing.views(part, layer, 0, count):
                piece[:] = b"\xff" * len(piece)
        pair.second.abort(Abort(request_id=2))
        pair.second.submit(request)
        wait_until(lambda: pair.finished(request))
        assert [[pair.tokens(1, 0)]] == wanted
        pair.wait_until_free()


@pytest.mark.parametrize("kv_pages", [PageFormat.FLOAT, PageFormat.INT8])
def test_samples_of_a_prompt_share_what_was_sent_once(model: Decoder, kv_pages: PageFormat) -> None:
    request = submit(1, prompt_of(200), DRAWN, n=4)
    wanted = alone(make_engine(model, kv_pages=kv_pages, max_running=8), request)
    first, second = (make_engine(model, kv_pages=kv_pages, max_running=8) for _ in range(2))
    with couple(first, second) as pair:
        assert pair.answers(request) == wanted
        pair.wait_until_free()
        sent = sum(path.bytes for path in pair.first_node.stats())
        whole = first.page_format.record_bytes * first.page_format.layers
        assert sent < 5 * whole
        assert second.stats.prompt_tokens < 200


@pytest.mark.parametrize("n", [1, 3])
def test_a_sample_that_ends_with_its_first_token(model: Decoder, n: int) -> None:
    request = submit(1, prompt_of(70), msgspec.structs.replace(GREEDY, max_tokens=1), n=n)
    wanted = alone(make_engine(model), request)
    with couple(make_engine(model), make_engine(model)) as pair:
        assert pair.answers(request) == wanted
        ends = [[o.finish for o in pair.outputs[1, index]] for index in range(n)]
        assert ends == [[FinishReason.LENGTH]] * n
        pair.wait_until_free()


@pytest.mark.parametrize("path", [TransportPath.AUTO, TransportPath.SHARED_MEMORY])
@pytest.mark.parametrize(
    "forms", [(PageFormat.FLOAT, PageFormat.INT8), (PageFormat.INT8, PageFormat.FLOAT)]
)
def test_pages_are_converted_for_a_receiver_that_keeps_others(
    model: Decoder,
    forms: tuple[PageFormat, PageFormat],
    path: TransportPath,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Copies lie in no shared memory; what went over TCP is what figures show."""
    requests = [submit(number, prompt_of(length), GREEDY) for number, length in enumerate(LENGTHS)]
    engines = (make_engine(model, kv_pages=pages, max_running=8) for pages in forms)
    with couple(*engines, path=path) as pair:
        pair.answers(*requests)
        pair.wait_until_free()
        assert all(news == [None, None] for news in pair.moved.values())
        for node in (pair.first_node, pair.second_node):
            (stats,) = node.stats()
            assert stats.path.startswith("tcp")
            assert stats.rate > 0
    assert caplog.text.count("start both workers with the same --kv-pages") == 1


def test_a_tiny_receiver_grants_pages_one_after_the_other(model: Decoder) -> None:
    requests = [submit(number, prompt_of(150, number), GREEDY) for number in range(8)]
    wanted = alone(make_engine(model), *requests)
    with couple(make_engine(model), make_engine(model, pages=9)) as pair:
        assert pair.answers(*requests) == wanted
        pair.wait_until_free()


def test_aborts_at_any_moment_leave_nothing(model: Decoder) -> None:
    random = Random(1)
    requests = [submit(number, prompt_of(150, number), GREEDY) for number in range(30)]
    wanted = alone(make_engine(model), *requests)
    with couple(make_engine(model, pages=30), make_engine(model, pages=20)) as pair:
        aborted = set()
        for number, request in enumerate(requests):
            pair.submit(request)
            if random.random() < 0.5:
                gone = random.randrange(max(0, number - 3), number + 1)
                aborted.add(gone)
                pair.abort(gone)
        kept = [request for request in requests if request.request_id not in aborted]
        with pair.changed:
            assert pair.changed.wait_for(lambda: all(map(pair.finished, kept)), 60)
        pair.wait_until_free()
        for request, answer in zip(requests, wanted, strict=True):
            got = pair.tokens(request.request_id, 0)
            assert got == answer[0][: len(got)]
            assert request.request_id in aborted or got == answer[0]


def test_a_receiver_that_has_gone_frees_the_sender(model: Decoder) -> None:
    with couple(make_engine(model), make_engine(model)) as pair:
        pair.second_node.close()
        request = submit(1, prompt_of(100), GREEDY)
        pair.requests[1] = request
        part = msgspec.structs.replace(request, stage=Stage.PREFILL, peer=pair.second_node.peer)
        pair.first.submit(part)
        pair.first.relay(Granted(request_id=1))
        with pair.changed:
            assert pair.changed.wait_for(lambda: bool(pair.moved[1]), 60)
        assert pair.moved[1][0] is not None
        pair.wait_until_free()


@pytest.fixture
def on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Devices]:
    """Has engines of this process map each other's pages, as on a GPU that shares its memory."""
    memories: list[torch.Tensor] = []
    monkeypatch.setattr(device_memory, "attach", lambda memory, device: memories[memory.descriptor])

    def say(*engines: Engine, gpus: Sequence[str] = ()) -> Devices:
        said = []
        for gpu, engine in zip(gpus or ["one"] * len(engines), engines, strict=True):
            pages = engine._runner.pages
            found = []
            for memory in pages.memory:
                found.append(DeviceMemory(0, len(memories), memory.bytes.numel()))
                memories.append(memory.bytes)
            count = engine._runner.page_count
            opened = found[1] if len(found) > 1 else None
            said.append(DevicePages(gpu=gpu, pages=count, records=found[0], open=opened))
        return tuple(said)

    return say


@pytest.mark.parametrize(
    ("kv_pages", "gpus", "path"),
    [
        (PageFormat.FLOAT, ("one", "one"), TransportPath.AUTO),
        (PageFormat.INT8, ("one", "one"), TransportPath.AUTO),
        (PageFormat.INT8, ("one", "another"), TransportPath.SHARED_MEMORY),
    ],
)
def test_a_receiver_pulls_pages_out_of_its_neighbours_memory(
    model: Decoder,
    kv_pages: PageFormat,
    gpus: tuple[str, str],
    path: TransportPath,
    on_one_gpu: Callable[..., Devices],
) -> None:
    options = {"max_running": 6, "step_tokens": 134, "kv_pages": kv_pages}
    requests = [
        submit(number, prompt_of(length, length), DRAWN if number % 2 else GREEDY)
        for number, length in enumerate(LENGTHS)
    ]
    wanted = alone(make_engine(model, **options), *requests)
    first, second = make_engine(model, **options), make_engine(model, pages=50, **options)
    with couple(first, second, on_one_gpu(first, second, gpus=gpus), path) as pair:
        assert pair.answers(*requests) == wanted
        pair.wait_until_free()
        again = [msgspec.structs.replace(r, request_id=100 + r.request_id) for r in requests]
        assert pair.answers(*again) == wanted
        pair.wait_until_free()
        assert all(news == [None, None] for news in pair.moved.values())
        (sent,), (pulled,) = pair.first_node.stats(), pair.second_node.stats()
        assert sent.path == pulled.path == DEVICE_MEMORY
        assert sent.bytes == pulled.bytes > 10 * first.page_format.record_bytes
        assert pulled.rate > sent.rate == 0


def test_memory_that_cannot_be_mapped_goes_through_the_host(
    model: Decoder,
    on_one_gpu: Callable[..., Devices],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(memory: DeviceMemory, device: torch.device) -> torch.Tensor:
        raise device_memory.DeviceMemoryError("process 0 does not hand out its memory")

    request = submit(1, prompt_of(200), GREEDY)
    wanted = alone(make_engine(model), request)
    first, second = make_engine(model), make_engine(model)
    devices = on_one_gpu(first, second)
    monkeypatch.setattr(device_memory, "attach", refuse)
    with couple(first, second, devices) as pair:
        assert pair.answers(request) == wanted
        assert "does not hand out its memory" in caplog.text
        pair.wait_until_free()


@pytest.fixture
def attached(on_one_gpu: Callable[..., Devices], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The memories that were mapped, in order."""
    attach, mapped = device_memory.attach, []

    def note(memory: DeviceMemory, device: torch.device) -> torch.Tensor:
        mapped.append(memory.descriptor)
        return attach(memory, device)

    monkeypatch.setattr(device_memory, "attach", note)
    return mapped


def wait_at_second(pair: Couple, request: Submit, peer: Peer) -> None:
    """Has the second engine wait for pages that never come, and gives up."""
    pair.second.submit(msgspec.structs.replace(request, stage=Stage.DECODE, peer=peer))
    wait_until(lambda: request.request_id in pair.granted)
    pair.second.abort(Abort(request_id=request.request_id))
    pair.wait_until_free()


def test_memory_of_a_peer_stays_mapped_while_it_has_a_link(
    model: Decoder, on_one_gpu: Callable[..., Devices], attached: list[int]
) -> None:
    requests = [submit(number, prompt_of(200, number), GREEDY) for number in range(3)]
    wanted = alone(make_engine(model), *requests)
    first, second = make_engine(model), make_engine(model)
    with couple(first, second, on_one_gpu(first, second)) as pair:
        assert pair.answers(requests[0]) == wanted[:1]
        pair.wait_until_free()
        wait_at_second(pair, requests[1], pair.first_node.peer)
        assert pair.answers(requests[2]) == wanted[2:]
        pair.wait_until_free()
        assert attached == [0]
        handover = second._handover
        assert handover is not None
        pair.first_node.close()
        wait_until(lambda: not handover._attached)


def test_memory_of_a_peer_without_a_link_is_let_go_of(
    model: Decoder, on_one_gpu: Callable[..., Devices], attached: list[int]
) -> None:
    """Nothing would tell that it has died."""
    first, second = make_engine(model), make_engine(model)
    with couple(first, second, on_one_gpu(first, second)) as pair:
        wait_at_second(pair, submit(1, prompt_of(200), GREEDY), pair.first_node.peer)
        assert attached == [0]
        assert second._handover is not None
        assert not second._handover._attached


def test_a_peer_that_started_again_is_not_read_where_it_was_before(
    model: Decoder, on_one_gpu: Callable[..., Devices], attached: list[int]
) -> None:
    request = submit(1, prompt_of(200), GREEDY)
    wanted = alone(make_engine(model), request)
    first, second, third = (make_engine(model) for _ in range(3))
    devices = on_one_gpu(first, second, third)
    with couple(first, second, devices[:2]) as pair:
        assert pair.answers(request) == wanted
        pair.wait_until_free()
        assert attached == [0]
        again = msgspec.structs.replace(pair.first_node.peer, epoch=77, device=devices[2])
        assert again.name == pair.first_node.peer.name
        pair.second.submit(
            msgspec.structs.replace(request, request_id=2, stage=Stage.DECODE, peer=again)
        )
        wait_until(lambda: 2 in pair.granted)
        assert attached == [0, 2]
        handover = second._handover
        assert handover is not None
        landing = handover._landings[2]
        assert isinstance(landing, PullLanding)
        memory = landing._theirs.records_LPR.untyped_storage()
        assert memory.data_ptr() == third._runner.pages.memory[0].bytes.data_ptr()
        pair.second.abort(Abort(request_id=2))
        pair.wait_until_free()
        assert list(handover._attached) == [1]  # the first, whose link stands


def test_pages_that_arrive_before_a_step_is_read_lose_no_token(model: Decoder) -> None:
    """Where launching is computing, pages go out before an overlapped step is read."""
    requests = [submit(number, prompt_of(150, number), GREEDY) for number in range(12)]
    wanted = alone(make_engine(model), *requests)
    first, second = make_engine(model, overlap=True), make_engine(model, overlap=True)
    with couple(first, second) as pair:
        assert pair.answers(*requests) == wanted
        pair.wait_until_free()


def test_pages_that_leave_amid_a_step_without_memory_lose_no_token(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is tried again, smaller, when all its layers have left and are delivered."""
    request = submit(1, prompt_of(150), GREEDY)
    wanted = alone(make_engine(model), request)
    with couple(make_engine(model), make_engine(model)) as pair:
        engine, launched = pair.first, list[Launched]()
        launch, handover = engine._runner.launch, engine._handover
        assert handover is not None

        def short(plan: StepPlan) -> Launched:
            if launched:
                return launch(plan)
            wait_until(lambda: engine.receive() == [] and 1 in handover._grants)
            launched.append(launch(plan))
            wait_until(lambda: not engine._inbox.empty())  # they are delivered
            raise MemoryError

        monkeypatch.setattr(engine._runner, "launch", short)
        assert pair.answers(request) == wanted
        assert launched
        pair.wait_until_free()


def break_reading(pair: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair.first._handover is not None
    monkeypatch.setattr(pair.first._handover._memory, "records", broken)


def break_linking(pair: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.first_node, "link", broken)


def break_expecting(pair: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.second_node, "expect", broken)


def break_landing(pair: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostLanding, "land", broken)


def broken(*_: object) -> None:
    raise RuntimeError("no memory is left")


@pytest.mark.parametrize("break_it", [break_linking, break_reading, break_expecting, break_landing])
def test_pages_that_cannot_be_handled_fail_their_prompt_alone(
    model: Decoder,
    break_it: Callable[[Couple, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request, other = (submit(number, prompt_of(150, number), GREEDY) for number in (1, 2))
    wanted = alone(make_engine(model), other)
    with couple(make_engine(model), make_engine(model)) as pair:
        with monkeypatch.context() as patch:
            break_it(pair, patch)
            pair.submit(request)
            wait_until(lambda: any(pair.moved[1]))
            pair.abort(1)
            pair.wait_until_free()
        assert "RuntimeError: no memory is left" in next(filter(None, pair.moved[1]))
        assert pair.answers(other) == wanted
        pair.wait_until_free()


@pytest.fixture
def told_late(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    """Makes engines whose steps say by themselves how far they are, as those of a GPU do."""
    monkeypatch.setattr(sending, "_AT_ONCE", 0)

    def make() -> Engine:
        engine = make_engine(model, max_running=6, step_tokens=128, kv_pages=PageFormat.INT8)
        launch, layers = engine._runner.launch, model.config.layers

        def launched(plan: StepPlan) -> Launched:
            seen = itertools.chain(range(layers), itertools.repeat(layers))
            return dataclasses.replace(launch(plan), reached=lambda: next(seen))

        monkeypatch.setattr(engine._runner, "launch", launched)
        monkeypatch.setattr(Handover, "stored", lambda *_: None)
        return engine

    return make


def test_pages_leave_as_steps_tell_how_far_they_are(
    model: Decoder, told_late: Callable[[], Engine]
) -> None:
    """Nothing else sends a prompt here, not even the end of a step."""
    options = {"max_running": 6, "step_tokens": 128, "kv_pages": PageFormat.INT8}
    requests = [submit(n, prompt_of(length, length), GREEDY) for n, length in enumerate(LENGTHS)]
    wanted = alone(make_engine(model, **options), *requests)
    with couple(told_late(), make_engine(model, **options)) as pair:
        assert pair.answers(*requests) == wanted
        pair.wait_until_free()
        handover = pair.first._handover
        assert handover is not None
        wait_until(lambda: not handover._courier._followed)


def test_prompts_that_are_aborted_while_they_leave_hold_nothing(
    model: Decoder, told_late: Callable[[], Engine]
) -> None:
    options = {"max_running": 6, "step_tokens": 128, "kv_pages": PageFormat.INT8}
    with couple(told_late(), make_engine(model, **options)) as pair:
        for number in range(12):
            pair.submit(submit(number, prompt_of(300, number), GREEDY))
            pair.abort(number)
        pair.wait_until_free()
        handover = pair.first._handover
        assert handover is not None
        wait_until(lambda: not handover._courier._followed and not handover._sendings)
        request = submit(50, prompt_of(300, 50), GREEDY)
        assert pair.answers(request) == alone(make_engine(model, **options), request)


def test_a_receiver_on_the_same_gpu_gets_pages_at_the_end_of_a_step(model: Decoder) -> None:
    memory = DeviceMemory(1, 1, 1)
    here, there = (DevicePages(gpu=gpu, pages=1, records=memory) for gpu in ("one", "other"))
    with couple(make_engine(model), make_engine(model)) as pair:
        handover, node = pair.first._handover, pair.first_node
        assert handover is not None
        node.peer = msgspec.structs.replace(node.peer, device=here)

        def shares(device: DevicePages | None, **changes: object) -> bool:
            peer = msgspec.structs.replace(pair.second_node.peer, device=device, **changes)
            request = submit(1, [5], GREEDY)
            request = msgspec.structs.replace(request, stage=Stage.PREFILL, peer=peer)
            return handover._shares_gpu(Sample(request, 0, 0, None, 10, None))

        assert shares(here)
        assert not shares(there)
        assert not shares(None)
        assert not shares(here, host_id="another")

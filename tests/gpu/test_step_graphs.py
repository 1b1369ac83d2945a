"""Steps replayed from CUDA graphs, and launched before the last one was read."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.graphs import StepGraph, round_room
from fourfold.engine.messages import SamplingParams, Submit, TokenOutput
from fourfold.engine.program import StepOutputs
from fourfold.engine.runner import Runner
from fourfold.engine.sampler import Adjustment
from fourfold.kernels.decode_attention import PlanCapacity
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import PageFormat, Precision
from fourfold.quadrants.kv_pages import PAGE_TOKENS, Span
from fourfold.quadrants.step import CodedWork, StepRoom
from tests.cpu import tiny
from tests.cpu.driving import GREEDY, run, submit, tokens

GPU = torch.device("cuda:0")
News = dict[tuple[int, int], list[TokenOutput]]


@pytest.fixture(scope="module", params=["qwen3-moe-wide", "llama-wide"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tiny.save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    options = LoadOptions(device=GPU, precision=Precision.W4A8)
    return load_model(find_source(str(path)), options)


def answers(
    model: Decoder, asked: list[Submit], *, graphs: bool, overlap: bool
) -> tuple[News, Engine]:
    config = EngineConfig(
        kv_memory_gib=0.25, max_running=8, step_tokens=300, cuda_graphs=graphs, overlap=overlap
    )
    engine = Engine(Runner(model, config, pages_of(model, PageFormat.INT8)), config)
    return run(engine, asked), engine


def unstopped() -> list[Submit]:
    """As many requests as run together, which end by their lengths."""
    return [
        msgspec.structs.replace(
            request,
            n=1,
            sampling=msgspec.structs.replace(request.sampling, stop_token_ids=()),
        )
        for request in requests()[:8]
    ]


def requests() -> list[Submit]:
    random = Random(7)
    made = []
    for request_id in range(14):
        params = SamplingParams(
            temperature=(0.0, 0.9)[request_id % 2],
            top_p=0.9,
            repetition_penalty=(1.0, 1.3)[request_id % 3 == 0],
            logit_bias={5: 1.0} if request_id == 9 else {},
            logprobs=(0, None, 3)[request_id % 3],
            seed=request_id,
            max_tokens=(90, 12, 40)[request_id % 3],
            stop_token_ids=(17, 40),
        )
        prompt = [random.randrange(3, 320) for _ in range(1 + 23 * request_id)]
        made.append(submit(request_id, prompt, params, n=1 + request_id % 2))
    return made


def test_graphs_recorded_ahead_are_those_that_steps_need(model: Decoder) -> None:
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=300)
    prompts = [submit(n, range(5, 5 + tokens), GREEDY) for n, tokens in enumerate((40, 100, 250))]

    def warmed(*, ahead: bool) -> Runner:
        runner = Runner(model, config, pages_of(model, PageFormat.INT8))
        runner.warm()
        while ahead and runner.prepare():
            pass
        return runner

    runners = warmed(ahead=True), warmed(ahead=False)
    known, fresh = (Engine(runner, config) for runner in runners)
    before = [runner.graphs for runner in runners]
    for prompt in prompts:
        assert run(known, [prompt]) == run(fresh, [prompt])
    assert before[0] > before[1]
    assert [runner.graphs for runner in runners] == [before[0], before[1] + len(prompts)]


def test_a_graph_that_holds_more_gives_the_same_answers(model: Decoder) -> None:
    """Steps of short contexts by a graph that was recorded for long ones."""
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=600)
    runners = [Runner(model, config, pages_of(model, PageFormat.INT8)) for _ in range(2)]
    engine, other = (Engine(runner, config) for runner in runners)
    graphs, planner = runners[0]._graphs, runners[0]._planner
    assert graphs is not None

    def work(tokens: int) -> CodedWork:
        pages = -(-tokens // PAGE_TOKENS)
        tables = [list(range(i * pages, (i + 1) * pages)) for i in range(8)]
        return CodedWork([Span(tokens - 1, 1, t, i) for i, t in enumerate(tables)], [], planner)

    def capacity(tokens: int) -> tuple[StepRoom, PlanCapacity]:
        room = round_room(work(tokens), runners[0]._max_pages)
        assert room is not None
        assert room.decode is not None
        return room, room.decode

    def serving() -> StepGraph:
        return graphs.step(capacity(60)[0], adjustment=Adjustment.NONE, kept=False)

    short, plan = capacity(60)
    rooms = {n: capacity(n) for n in range(80, 1500, 20)}
    long = next(n for n, (r, p) in rooms.items() if r != short and p.merged == plan.merged)
    with torch.inference_mode(), runners[0].on_stream():
        runners[0]._padded_step(work(long), StepGraph.record)
    graph = serving()
    assert graph.is_recorded
    assert graph.room == rooms[long][0]
    asked = [submit(n, [3 + (7 * n + i) % 300 for i in range(60)], GREEDY) for n in range(8)]
    assert run(engine, asked) == run(other, asked)
    assert serving() is graph


@pytest.fixture(params=["usual", "one form"])
def forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether steps attend by kernels of several forms, which cut sums otherwise: by how many
    programs there are, and beside prompts by how many there may be."""
    if request.param == "one form":
        covering = PlanCapacity.covering
        monkeypatch.setattr(PlanCapacity, "are_few", lambda capacity, kv_heads: False)
        monkeypatch.setattr(
            PlanCapacity, "covering", lambda plan, rows, beside_prompts=False: covering(plan, rows)
        )
    return str(request.param)


def assert_likely(model: Decoder, asked: list[Submit], news: News) -> None:
    """Each token is as likely as was said, after the prompt and the tokens before it; but for
    rounding, which now and then chooses another expert."""
    prompts = {request.request_id: request.prompt_ids for request in asked}
    texts = [(*prompts[number], *tokens(outputs)) for (number, _), outputs in news.items()]
    scoring = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=True)
    config = EngineConfig(
        kv_memory_gib=0.25, max_running=8, step_tokens=1000, cuda_graphs=False, prefix_cache=False
    )
    engine = Engine(Runner(model, config, pages_of(model, PageFormat.INT8)), config)
    scores = run(engine, [submit(i, text, scoring) for i, text in enumerate(texts)])
    for i, (sample, outputs) in enumerate(news.items()):
        likely = scores[i, 0][0].prompt_logprobs
        assert likely is not None
        right = likely[len(prompts[sample[0]]) - 1 :]
        off = [
            abs(output.logprob.logprob - each.logprob)
            for output, each in zip(outputs, right, strict=True)
            if output.logprob is not None
        ]
        assert sum(off) <= 1.0 + 0.12 * len(off), (sample, off)


def same_tokens(one: News, other: News) -> float:
    """The part of all samples that are the same."""
    assert one.keys() == other.keys()
    return sum(tokens(one[sample]) == tokens(other[sample]) for sample in one) / len(one)


def test_overlap_changes_nothing(model: Decoder) -> None:
    """Where no stop is noticed late, so that the same samples share each step: the same bits."""
    plain, _ = answers(model, unstopped(), graphs=True, overlap=False)
    overlapped, engine = answers(model, unstopped(), graphs=True, overlap=True)
    assert engine.stats.graphs > 0
    assert overlapped == plain


def test_stops_noticed_late(model: Decoder, forms: str) -> None:
    """Other samples share the steps, so not all are the same."""
    plain, _ = answers(model, requests(), graphs=True, overlap=False)
    overlapped, engine = answers(model, requests(), graphs=True, overlap=True)
    assert all(outputs[-1].finish for outputs in overlapped.values())
    assert engine.scheduler.pool.in_use == 0
    assert_likely(model, requests(), overlapped)
    assert same_tokens(plain, overlapped) >= (0.5 if forms == "one form" else 0.2)


def test_graphs_change_nothing(model: Decoder, forms: str) -> None:
    eager, engine = answers(model, requests(), graphs=False, overlap=False)
    assert engine.stats.graphs == 0
    recorded, engine = answers(model, requests(), graphs=True, overlap=False)
    assert engine.stats.graphs > 0
    assert_likely(model, requests(), recorded)
    assert same_tokens(eager, recorded) >= (0.8 if forms == "one form" else 0.2)


def test_after_memory_ran_out_steps_are_recorded_again(model: Decoder) -> None:
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=300, prefix_cache=False)
    runner = Runner(model, config, pages_of(model, PageFormat.INT8))
    runner.warm()
    engine = Engine(runner, config)
    wanted = run(engine, requests())
    before = runner.graphs
    runner.free_memory()
    assert run(engine, requests()) == wanted
    assert runner.graphs > before


@pytest.mark.parametrize("amid", [False, True])
def test_a_step_that_cannot_be_recorded_is_launched(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, amid: bool
) -> None:
    """Where a step breaks its recording, or CUDA does; later rooms are recorded in another pool."""
    wanted, plain = answers(model, unstopped(), graphs=True, overlap=False)
    enqueue, end = StepGraph._enqueue, torch.cuda.CUDAGraph.capture_end
    failed: list[bool] = []

    def fail_once() -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError("cannot be recorded")

    def enqueued(graph: StepGraph) -> StepOutputs:
        outputs = enqueue(graph)
        if torch.cuda.is_current_stream_capturing():
            fail_once()
        return outputs

    def ended(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        fail_once()

    if amid:
        monkeypatch.setattr(StepGraph, "_enqueue", enqueued)
    else:
        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", ended)
    launched, engine = answers(model, unstopped(), graphs=True, overlap=False)
    assert failed
    assert engine.stats.graphs == plain.stats.graphs - 1
    assert launched == wanted


@pytest.mark.parametrize("again", [False, True])
def test_the_largest_room_is_recorded_first(model: Decoder, again: bool) -> None:
    """So that no later room needs pieces of memory of its own; also after memory ran short."""
    config = EngineConfig(kv_memory_gib=0.25, max_running=64, step_tokens=4096)
    runner = Runner(model, config, pages_of(model, PageFormat.INT8))
    runner.warm()
    engine = Engine(runner, config)
    if again:
        runner.free_memory()
        run(engine, [submit(0, [3], GREEDY)])
    reserved = torch.cuda.memory_reserved()
    for length in (130, 300, 520, 700, 950):
        prompts = [[3 + (7 * i + n) % 300 for i in range(length)] for n in range(8)]
        params = SamplingParams(temperature=0.0, max_tokens=20)
        run(engine, [submit(n, prompt, params) for n, prompt in enumerate(prompts)])
    assert torch.cuda.memory_reserved() - reserved < 64 << 20

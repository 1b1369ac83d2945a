"""Recordings that fail, and what is recorded after memory ran short; over a stand-in for CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fourfold.engine import graphs
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.graphs import StepGraph, StepGraphs, round_rows
from fourfold.engine.messages import SamplingParams
from fourfold.engine.program import StepOutputs, run_step
from fourfold.engine.progress import Progress
from fourfold.engine.runner import Runner
from fourfold.engine.sampler import Adjustment, Samples
from fourfold.engine.warming import usual_steps
from fourfold.kernels.staging import Staging
from fourfold.models.decoder import Decoder
from fourfold.models.loading import pages_of
from fourfold.models.precision import PageFormat
from fourfold.quadrants.kv_pages import CodedPages, Span
from fourfold.quadrants.step import CodedWork, QuadrantStep
from tests.cpu.driving import load_tiny, run, submit, tokens

CONFIG = EngineConfig(kv_memory_gib=0.02, max_running=4, step_tokens=512, prefix_cache=False)
LARGEST = 16 + round_rows(512)
"""Rows of the largest room: fewer than 16 decode rows are not worth one of their own."""
SHORTAGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
BROKEN = RuntimeError("CUDA error: operation failed due to a previous error during capture")


class Recorder:
    """Stands in for CUDA: what is enqueued while a graph is recorded runs when that is replayed,
    and a pool in which a recording broke off takes no other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.amid: list[Exception | None] = []
        """How the next recordings fail while steps are enqueued, if they do."""
        self.at_end: list[Exception | None] = []
        """And how when they end."""
        self.tried: list[int] = []
        """Rows of the rooms that were to be recorded."""
        self.recorded: list[int] = []
        """Of those that were."""
        self.launched: list[int] = []
        """Of steps that were launched kernel by kernel."""
        self.replays = 0
        self.recording: Graph | None = None
        self.busy: set[object] = set()
        """Pools in which a recording is under way, or broke off."""
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(graphs, "run_step", self.run_step)

    def run_step(
        self,
        model: Decoder,
        step: QuadrantStep,
        inputs: Staging,
        samples: Samples,
        *,
        adjustment: Adjustment,
    ) -> StepOutputs:
        def launch() -> StepOutputs:
            return run_step(model, step, inputs, samples, adjustment=adjustment)

        rows = len(inputs["tokens"])
        if self.recording is None:
            self.launched.append(rows)
            return launch()
        self.tried.append(rows)
        if self.amid and (error := self.amid.pop(0)):
            raise error
        sampled = len(inputs["sampled"])
        outputs = StepOutputs(None, None, torch.zeros(sampled).long(), torch.zeros(sampled))
        self.recording.rows, self.recording.step = rows, (launch, outputs)
        return outputs


class Graph:
    """A `torch.cuda.CUDAGraph` of one step."""

    rows: int
    step: tuple[Callable[[], StepOutputs], StepOutputs]

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def capture_begin(self, pool: object, *, capture_error_mode: str) -> None:
        assert capture_error_mode == "relaxed"
        recorder = self._recorder
        assert pool not in recorder.busy, "already recording to mempool_id"
        recorder.busy.add(pool)
        recorder.recording, self._pool = self, pool

    def capture_end(self) -> None:
        recorder = self._recorder
        recorder.recording = None
        if recorder.at_end and (error := recorder.at_end.pop(0)):
            raise error
        recorder.busy.discard(self._pool)
        if hasattr(self, "rows"):
            recorder.recorded.append(self.rows)

    def replay(self) -> None:
        self._recorder.replays += 1
        launch, outputs = self.step
        drawn = launch()
        outputs.tokens_S.copy_(drawn.tokens_S)
        outputs.logprobs_S.copy_(drawn.logprobs_S)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def make_runner(model: Decoder, *, recorded: bool = True, config: EngineConfig = CONFIG) -> Runner:
    runner = Runner(model, config, pages_of(model, PageFormat.INT8))
    if recorded:
        assert isinstance(runner.pages, CodedPages)
        runner._graphs = StepGraphs(
            model, runner.pages, runner._samples, Progress(2, runner.device)
        )
    return runner


def answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of prompts whose steps fill their rooms' decode rows, as they must on a CPU."""
    params = SamplingParams(temperature=0.0, max_tokens=5)
    news = run(engine, [submit(n, prompt, params) for n, prompt in enumerate(prompts)])
    return [tokens(outputs) for outputs in news.values()]


def alone(model: Decoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Their answers without graphs."""
    return answers(Engine(make_runner(model, recorded=False), CONFIG), prompts)


PROMPTS = [range(3 + n, 40 + 9 * n) for n in range(4)]
LONG = [range(3, 203)]


@pytest.mark.parametrize(
    ("amid", "at_end"),
    [(None, BROKEN), (RuntimeError("a kernel that cannot be recorded"), BROKEN), (BROKEN, None)],
)
def test_a_step_that_cannot_be_recorded_is_launched(
    model: Decoder, recorder: Recorder, amid: Exception | None, at_end: Exception | None
) -> None:
    """And other rooms are recorded, in another pool."""
    engine = Engine(make_runner(model), CONFIG)
    recorder.amid, recorder.at_end = [amid], [at_end]
    wanted = alone(model, PROMPTS)
    assert answers(engine, PROMPTS) == wanted
    prompts, decodes = round_rows(sum(map(len, PROMPTS))), 4
    assert recorder.tried == [prompts, decodes]
    assert recorder.recorded == [decodes]
    assert recorder.launched == [prompts]
    assert recorder.replays == 4
    assert answers(engine, PROMPTS) == wanted
    assert recorder.tried == [prompts, decodes], "what cannot be recorded is tried once"


@pytest.mark.parametrize(
    ("amid", "at_end"),
    [
        (None, torch.AcceleratorError("CUDA error: out of memory")),
        (SHORTAGE, None),
        (SHORTAGE, BROKEN),
    ],
)
def test_a_recording_beyond_memory_is_tried_smaller(
    model: Decoder, recorder: Recorder, amid: Exception | None, at_end: Exception | None
) -> None:
    """After the largest, in whose pieces of memory it then fits."""
    engine = Engine(make_runner(model), CONFIG)
    recorder.amid, recorder.at_end = [amid], [at_end]
    assert answers(engine, LONG) == alone(model, LONG)
    assert engine.stats.shortages == 1
    assert recorder.tried == [round_rows(200), LARGEST, 64, 128, 1]  # in chunks of 64, 64 and 72
    assert not recorder.launched


@pytest.mark.parametrize("error", [SHORTAGE, BROKEN, TypeError("a mistake of ours")])
def test_a_recording_that_broke_off_leaves_the_pool(
    model: Decoder, recorder: Recorder, error: Exception
) -> None:
    runner = make_runner(model)
    assert runner._graphs is not None
    pool = runner._graphs.pool
    recorder.amid = [error]
    with contextlib.suppress(type(error)):
        runner._padded_step(runner._largest_work(), StepGraph.record)
    assert runner._graphs.pool is not pool


def test_without_memory_for_the_largest_room_smaller_ones_are_recorded(
    model: Decoder, recorder: Recorder
) -> None:
    runner = make_runner(model)
    engine = Engine(runner, CONFIG)
    for _ in range(2):
        runner.free_memory()
        recorder.amid, recorder.tried, recorder.recorded = [SHORTAGE], [], []
        assert answers(engine, LONG) == alone(model, LONG)
        assert engine.stats.shortages == 0
        assert recorder.tried == [LARGEST, round_rows(200), 1]
        assert recorder.recorded[-2:] == [round_rows(200), 1]


def test_the_largest_room_is_given_up_where_memory_ran_short_with_it(
    model: Decoder, recorder: Recorder
) -> None:
    runner = make_runner(model)
    engine = Engine(runner, CONFIG)
    first = []
    for _ in range(4):
        runner.free_memory()
        recorder.recorded = []
        answers(engine, LONG)
        first.append(recorder.recorded[0])
    assert first == [LARGEST, round_rows(200)] * 2


def test_nothing_is_recorded_ahead_once_memory_ran_short(
    model: Decoder, recorder: Recorder
) -> None:
    runner = make_runner(model)
    engine = Engine(runner, CONFIG)
    runner._ahead = usual_steps(CONFIG.on("cpu"), runner.max_context, runner.page_count)
    assert runner.prepare()
    assert runner.graphs == 1
    recorder.amid, recorder.at_end = [SHORTAGE], [BROKEN]
    assert runner.prepare()
    assert not runner.prepare()
    recorder.tried = []
    assert answers(engine, LONG) == alone(model, LONG)
    assert recorder.tried[0] == LARGEST


def test_all_that_is_recorded_ahead_fits_sequences_and_pages(
    model: Decoder, recorder: Recorder
) -> None:
    """Prompts of a step are many where a sequence is short."""
    config = dataclasses.replace(CONFIG, step_tokens=2048, mixed_tokens=300)
    runner = make_runner(model, config=config)
    assert runner.max_context < 4 * 300
    runner._ahead = usual_steps(config.on("cpu"), runner.max_context, runner.page_count)
    while runner.prepare():
        pass
    assert max(recorder.recorded) == 16 + round_rows(2048 - 4)
    assert runner.graphs > 10


def test_a_graph_serves_steps_of_as_many_rows_that_it_holds(
    model: Decoder, recorder: Recorder
) -> None:
    runner = make_runner(model)
    assert runner._graphs is not None
    decodes = [Span(3, 1, [0], slot) for slot in range(4)]
    many, few = (
        CodedWork(decodes, [Span(0, 300 // chunks, [0] * 5)] * chunks, None) for chunks in (20, 1)
    )
    with torch.inference_mode():
        assert runner._padded_step(few, StepGraph.record)
        assert runner._padded_step(many, StepGraph.record)
        assert len(recorder.recorded) == 2, "fewer prompts do not hold more"
        runner._graphs.forget()
        for work in (many, few, many, few):
            assert runner._padded_step(work, StepGraph.record)
        assert len(recorder.recorded) == 3
        longer = CodedWork(decodes, [Span(0, 400, [0] * 7)], None)
        assert runner._padded_step(longer, StepGraph.record)
        assert len(recorder.recorded) == 4, "more rows have a graph of their own"
        runner._graphs.forget()
        assert runner._padded_step(few, StepGraph.record)
    assert len(recorder.recorded) == 5, "what served is gone"

"""Launching a step before the last one's tokens are known changes nothing but the time."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from fourfold.engine import limit, runner
from fourfold.engine.engine import Engine
from fourfold.engine.messages import Abort, FinishReason, SamplingParams, Submit
from fourfold.engine.program import StepOutputs
from fourfold.engine.runner import Launched
from fourfold.engine.scheduler import Sampled, StepPlan
from fourfold.models.decoder import Decoder
from tests.cpu.driving import load_tiny, make_engine, run, submit, tokens

Fetched = Callable[[], list[Sampled]]
VOCABULARY = 320


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe"))


def requests(seed: int, count: int = 12) -> list[Submit]:
    """Samplings of every kind, answers that stop early, samples of one prompt."""
    random = Random(seed)
    made = []
    for request_id in range(count):
        prompt = [random.randrange(VOCABULARY) for _ in range(random.choice((1, 5, 64, 90, 130)))]
        params = SamplingParams(
            temperature=random.choice((0.0, 0.8, 1.5)),
            top_p=random.choice((1.0, 0.9)),
            repetition_penalty=random.choice((1.0, 1.3)),
            frequency_penalty=random.choice((0.0, 0.7)),
            logit_bias=random.choice(({}, {3: 4.0})),
            logprobs=random.choice((None, 0, 2)),
            seed=request_id,
            max_tokens=random.choice((1, 2, 7, 70)),
            stop_token_ids=tuple(random.sample(range(VOCABULARY), 12)),
        )
        made.append(submit(request_id, prompt, params, n=random.choice((1, 1, 3))))
    return made


def answers(engine: Engine, asked: Sequence[Submit]) -> dict[tuple[int, int], object]:
    return {
        sample: (
            tokens(outputs),
            [output.finish for output in outputs if output.finish],
            [output.logprob and output.logprob.token for output in outputs],
        )
        for sample, outputs in run(engine, asked).items()
    }


def compare(model: Decoder, asked: Sequence[Submit], **options: int) -> list[Engine]:
    engines = [make_engine(model, overlap=overlap, **options) for overlap in (False, True)]
    plain, overlapped = (answers(engine, asked) for engine in engines)
    assert overlapped == plain
    return engines


@pytest.mark.parametrize("seed", range(3))
def test_the_same_answers(model: Decoder, seed: int) -> None:
    compare(model, requests(seed), pages=16, max_running=6, step_tokens=80)


def test_the_same_answers_when_pages_run_out(model: Decoder) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=140, repetition_penalty=1.2, seed=5)
    asked = [submit(i, [i] * (50 + 7 * i), params) for i in range(5)]
    for engine in compare(model, asked, pages=8, max_running=5, step_tokens=80):
        assert engine.stats.preemptions > 0


def test_news_comes_one_step_later(model: Decoder) -> None:
    engine = make_engine(model, overlap=True)
    engine.submit(submit(0, [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=2)))
    engine.receive()
    assert engine.step() == []
    assert [output.finish for output in engine.step() or ()] == [None]
    assert [output.finish for output in engine.step() or ()] == [FinishReason.LENGTH]
    assert engine.step() is None
    assert engine.idle


def test_a_sample_that_ends_under_way_leaves_nothing_behind(model: Decoder) -> None:
    engine = make_engine(model, overlap=True, prefix_cache=False)
    engine.submit(submit(0, range(70), SamplingParams(temperature=0.0, max_tokens=50)))
    engine.receive()
    for _ in range(4):
        engine.step()
    engine.abort(Abort(request_id=0))
    assert [output.finish for output in engine.receive() or ()] == [FinishReason.CANCELLED]
    assert engine.step() == []
    assert engine.idle
    assert engine.stats.pages_in_use == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_beyond_memory_is_tried_smaller(
    model: Decoder, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(4)
    options = {"pages": 24, "max_running": 6, "step_tokens": 300, "overlap": overlap}
    wanted = answers(make_engine(model, **options), asked)
    engine = make_engine(model, **options)
    launch, refused = engine._runner.launch, []
    held: list[weakref.ref[torch.Tensor]] = []

    def limited(plan: StepPlan) -> Launched:
        if plan.tokens > 90 or (len(refused) == 4 and plan.tokens == 3):
            refused.append(plan.tokens)
            activations = torch.zeros(plan.tokens)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan)

    def free() -> None:
        assert held[-1]() is None, "what the step had allocated is still there"

    monkeypatch.setattr(engine._runner, "launch", limited)
    monkeypatch.setattr(engine._runner, "free_memory", free)
    assert answers(engine, asked) == wanted
    assert refused
    assert engine.idle


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_grow_again_once_there_is_memory(
    model: Decoder,
    overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(limit, "_SOONEST", 2)
    caplog.set_level(logging.INFO)
    options = {"max_running": 6, "step_tokens": 300, "overlap": overlap, "prefix_cache": False}
    engine = make_engine(model, **options)
    launch, room, largest = engine._runner.launch, 90, [0]

    def limited(plan: StepPlan) -> Launched:
        if plan.tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        largest.append(plan.tokens)
        return launch(plan)

    def wave(of: Engine, number: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=2)
        asked = [submit(8 * number + i, range(i, i + 300), params) for i in range(8)]
        return [tokens(outputs) for outputs in run(of, asked).values()]

    wanted = sorted(wave(make_engine(model, **options), 0))
    monkeypatch.setattr(engine._runner, "launch", limited)
    assert sorted(wave(engine, 0)) == wanted
    assert max(largest) <= 90
    assert engine.stats.step_tokens <= 90
    shortages = engine.stats.shortages
    assert shortages == caplog.text.count("did not fit into memory; trying less") > 1
    room = 1000
    for number in range(1, 8):
        assert sorted(wave(engine, number)) == wanted
    assert max(largest) == 300
    assert engine.stats.step_tokens == 300
    assert engine.stats.shortages == shortages
    assert caplog.text.count("as large again") == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_of_a_step_that_cannot_be_read_for_memory_are_drawn_again(
    model: Decoder, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step has counted them by then, and put them where the next one looks for its input."""
    asked = requests(4)
    options = {"pages": 24, "max_running": 6, "step_tokens": 300, "overlap": overlap}
    wanted = answers(make_engine(model, **options), asked)
    engine = make_engine(model, **options)
    fetch, drawn = runner.fetch_drawn, itertools.count(1)

    def limited(outputs: StepOutputs, alternatives: Sequence[int | None]) -> Fetched:
        if next(drawn) % 7 == 0 and len(alternatives) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fetch(outputs, alternatives)

    monkeypatch.setattr(runner, "fetch_drawn", limited)
    assert answers(engine, asked) == wanted
    assert next(drawn) > 14


@pytest.mark.parametrize("overlap", [False, True])
def test_samples_that_do_not_fit_together_take_turns(
    model: Decoder, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody is taken for too many again."""
    engine = make_engine(model, overlap=overlap)
    launch, refused = engine._runner.launch, []

    def limited(plan: StepPlan) -> Launched:
        if len(plan.work) > 1:
            refused.append(len(plan.work))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan)

    params = SamplingParams(temperature=0.0, max_tokens=9)
    asked = [submit(number, [number + 3] * 5, params) for number in range(4)]
    wanted = answers(make_engine(model), asked)
    monkeypatch.setattr(engine._runner, "launch", limited)
    assert answers(engine, asked) == wanted
    assert len(refused) < 9
    assert engine.scheduler.preemptions == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_step_beyond_memory_computes_nothing(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = make_engine(model)
    launch = engine._runner.launch

    def limited(plan: StepPlan) -> Launched:
        if plan.tokens > 90:
            raise error
        return launch(plan)

    monkeypatch.setattr(engine._runner, "launch", limited)
    run(engine, [submit(0, [5] * 300, SamplingParams(max_tokens=1))])
    assert engine.stats.prompt_tokens == 300
    assert engine.stats.steps == 4


def test_a_sample_that_never_fits_fails_alone(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, overlap=True)

    def never(plan: StepPlan) -> Launched:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", never)
        outputs = run(engine, [submit(0, [1, 2], SamplingParams(max_tokens=3))])[0, 0]
    assert [output.finish for output in outputs] == [FinishReason.FAILED]
    assert outputs[0].error == "OutOfMemoryError: CUDA out of memory"
    assert len(tokens(run(engine, [submit(1, [1, 2], SamplingParams(max_tokens=3))])[1, 0])) == 3

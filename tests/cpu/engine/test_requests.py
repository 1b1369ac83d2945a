"""What a request asks for is what it gets, through a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from torch import Tensor

from fourfold.engine.engine import Engine
from fourfold.engine.messages import Abort, FinishReason, SamplingParams, TokenLogprob, TokenOutput
from fourfold.engine.runner import Launched
from fourfold.engine.scheduler import StepPlan
from fourfold.errors import ConfigError
from fourfold.models.decoder import Decoder
from tests.cpu.driving import GREEDY, generate, load_tiny, make_engine, run, submit, tokens

Reference = transformers.PreTrainedModel
FAMILY = "qwen3-moe"
DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=11)


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint(FAMILY))


@pytest.fixture
def hf(reference: Callable[[str], Reference]) -> Reference:
    return reference(FAMILY)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def hf_greedy(hf: Reference, prompt: list[int], count: int, **options: float) -> list[int]:
    ids = torch.tensor([prompt])
    out = hf.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, **options)
    return out[0, len(prompt) :].tolist()


def hf_logprobs(hf: Reference, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return hf(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def finishes(outputs: Sequence[TokenOutput]) -> list[FinishReason]:
    return [output.finish for output in outputs if output.finish is not None]


def with_(params: SamplingParams, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


def test_a_stop_token_ends_a_sample_and_is_told(model: Decoder, hf: Reference) -> None:
    prompt = prompt_of(40)
    wanted = hf_greedy(hf, prompt, 24)
    stop = wanted[5]
    params = with_(GREEDY, stop_token_ids=(2, stop))
    outputs = run(make_engine(model), [submit(0, prompt, params)])[0, 0]
    assert tokens(outputs) == wanted[: wanted.index(stop) + 1]
    assert finishes(outputs) == [FinishReason.STOP]
    assert outputs[-1].token == stop


def test_one_token(model: Decoder, hf: Reference) -> None:
    prompt = prompt_of(70)
    engine = make_engine(model, max_running=2, step_tokens=30)
    [output] = run(engine, [submit(0, prompt, with_(GREEDY, max_tokens=1))])[0, 0]
    assert output.token == hf_greedy(hf, prompt, 1)[0]
    assert output.finish is FinishReason.LENGTH
    assert engine.stats.pages_in_use == 0


@pytest.mark.parametrize(
    ("max_context", "pages", "limit"), [(50, 64, 50), (None, 2, 128), (None, 64, 1024)]
)
def test_the_context_limit_ends_a_sample(
    model: Decoder, hf: Reference, max_context: int | None, pages: int, limit: int
) -> None:
    """The limit asked for, that of the pages, and that of the model."""
    prompt = prompt_of(limit - 7)
    engine = make_engine(model, pages=pages, max_context=max_context)
    assert engine.max_context == limit
    outputs = run(engine, [submit(0, prompt, GREEDY)])[0, 0]
    assert tokens(outputs) == hf_greedy(hf, prompt, 7)
    assert finishes(outputs) == [FinishReason.LENGTH]


@pytest.mark.parametrize(("max_context", "pages"), [(129, 2), (1025, 64)])
def test_a_context_that_cannot_be_held_is_refused(
    model: Decoder, max_context: int, pages: int
) -> None:
    with pytest.raises(ConfigError, match=f"--max-context {max_context} exceeds {max_context - 1}"):
        make_engine(model, pages=pages, max_context=max_context)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_share_the_pages_of_their_prompt(
    model: Decoder, hf: Reference, prefix_cache: bool
) -> None:
    """Without a prefix cache, too; then another request does not find them."""
    prompt, cached = prompt_of(150), 128
    engine = make_engine(model, prefix_cache=prefix_cache)
    news = run(engine, [submit(0, prompt, GREEDY, n=3)])
    assert len(news) == 3
    assert {tuple(tokens(outputs)) for outputs in news.values()} == {
        tuple(hf_greedy(hf, prompt, GREEDY.max_tokens))
    }
    assert [news[0, index][0].cached_tokens for index in range(3)] == [0, cached, cached]
    assert all(output.cached_tokens == 0 for outputs in news.values() for output in outputs[1:])
    assert engine.stats.cached_tokens == 2 * cached
    assert engine.stats.prompt_tokens == 150 * 3 - 2 * cached
    again = run(engine, [submit(1, prompt, GREEDY, n=2)])
    assert again[1, 0][0].cached_tokens == cached * prefix_cache
    assert again[1, 1][0].cached_tokens == cached


def test_seeds_repeat_and_samples_differ(model: Decoder) -> None:
    prompt, others = prompt_of(30), [submit(9, prompt_of(50, 1), GREEDY)]
    alone = run(make_engine(model), [submit(3, prompt, DRAWN, n=3)])
    answers = [tokens(alone[3, index]) for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    again = run(make_engine(model, max_running=2), [*others, submit(4, prompt, DRAWN, n=3)])
    assert [tokens(again[4, index]) for index in range(3)] == answers
    other = run(make_engine(model), [submit(3, prompt, with_(DRAWN, seed=12))])
    assert tokens(other[3, 0]) not in answers


def test_requests_without_a_seed_differ(model: Decoder) -> None:
    unseeded = with_(DRAWN, seed=None)
    news = run(make_engine(model), [submit(i, prompt_of(9), unseeded) for i in range(4)])
    assert len({tuple(tokens(outputs)) for outputs in news.values()}) == 4


def test_drawn_samples_survive_preemption(model: Decoder) -> None:
    """What is drawn depends on seed, sample and position, not on when it was computed."""
    params = with_(DRAWN, max_tokens=120, frequency_penalty=0.4, logprobs=1)
    requests = [submit(i, prompt_of(20 + i, i), params, n=2) for i in range(3)]
    roomy, tight = make_engine(model), make_engine(model, pages=6, step_tokens=70)
    wanted, news = run(roomy, requests), run(tight, requests)
    assert tight.stats.preemptions > roomy.stats.preemptions == 0
    assert {k: tokens(v) for k, v in news.items()} == {k: tokens(v) for k, v in wanted.items()}


def test_greedy_tokens_survive_preemption_with_the_prefix_cache(
    model: Decoder, hf: Reference
) -> None:
    """Samples that give way find their own pages again, as far as nobody has taken them."""
    prompts = [prompt_of(60)[:n] + prompt_of(10, n) for n in (8, 40, 60, 60)]
    params = with_(GREEDY, max_tokens=120)
    engine = make_engine(model, pages=8)
    assert generate(engine, prompts, params) == [hf_greedy(hf, p, 120) for p in prompts]
    assert engine.stats.preemptions > 0
    assert engine.stats.pages_in_use == 0


def test_abort_frees_pages_and_spares_others(model: Decoder, hf: Reference) -> None:
    engine = make_engine(model)
    keep, gone = prompt_of(70), prompt_of(100, 1)
    engine.submit(submit(0, keep, GREEDY))
    engine.submit(submit(1, gone, with_(GREEDY, max_tokens=500), n=2))
    engine.receive()
    news = [output for _ in range(6) for output in engine.step() or ()]
    in_use = engine.stats.pages_in_use
    engine.abort(Abort(request_id=1, index=0))
    news += engine.receive() or ()
    assert engine.stats.pages_in_use == in_use - 1  # the full page is the other sample's too
    engine.abort(Abort(request_id=1, reason=FinishReason.STOP))
    news += engine.receive() or ()
    assert engine.stats.pages_in_use == 2
    while not engine.scheduler.idle:
        news += engine.step() or ()
    ends = {(o.request_id, o.index): o.finish for o in news if o.finish is not None}
    assert ends == {
        (0, 0): FinishReason.LENGTH,
        (1, 0): FinishReason.CANCELLED,
        (1, 1): FinishReason.STOP,
    }
    kept = [output for output in news if output.request_id == 0]
    assert tokens(kept) == hf_greedy(hf, keep, GREEDY.max_tokens)
    assert engine.stats.pages_in_use == 0


def check_entries(
    entries: Sequence[TokenLogprob], wanted: Tensor, ids: Sequence[int], alternatives: int
) -> None:
    """One entry for each of `ids`, whose log-probabilities are the rows of `wanted`."""
    assert [entry.token for entry in entries] == list(ids)
    likeliest = wanted.topk(max(alternatives, 1), -1)
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(wanted[row, ids[row]].item(), abs=1e-3)
        assert len(entry.top) == alternatives
        values = [value for _, value in entry.top]
        assert values == pytest.approx(likeliest.values[row].tolist()[:alternatives], abs=1e-3)
        assert all(
            value == pytest.approx(wanted[row, token].item(), abs=1e-3)
            for token, value in entry.top
        )


@pytest.mark.parametrize("step_tokens", [70, 512])
def test_prompt_logprobs(model: Decoder, hf: Reference, step_tokens: int) -> None:
    """In chunks and whole, between others; a second time too, when its pages could be found."""
    prompt = prompt_of(300)
    engine = make_engine(model, step_tokens=step_tokens)
    params = with_(GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=True)
    wanted = hf_logprobs(hf, prompt)[:-1]
    for _ in range(2):
        around = [submit(i, prompt_of(40 + i, i), GREEDY) for i in (1, 3)]
        news = run(engine, [around[0], submit(2, prompt, params), around[1]])
        first, *others = news[2, 0]
        assert first.prompt_logprobs is not None
        check_entries(first.prompt_logprobs, wanted, prompt[1:], 2)
        assert all(output.prompt_logprobs is None for output in others)
        assert first.cached_tokens == 0
    [plain, *_] = run(engine, [submit(4, prompt, GREEDY)])[4, 0]
    assert plain.prompt_logprobs is None
    assert plain.cached_tokens == 256


def test_a_prompt_is_computed_once_to_report_on_it_for_all_samples(
    model: Decoder, hf: Reference
) -> None:
    prompt = prompt_of(300)
    engine = make_engine(model)
    params = with_(GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=True)
    news = run(engine, [submit(1, prompt, params, n=4)])
    [reported] = [n for outputs in news.values() for o in outputs if (n := o.prompt_logprobs)]
    assert news[1, 0][0].prompt_logprobs is reported
    check_entries(reported, hf_logprobs(hf, prompt)[:-1], prompt[1:], 2)
    assert engine.stats.prompt_tokens == 300 + 3 * (300 - 256)
    assert [tokens(news[1, index]) for index in range(4)] == [tokens(news[1, 0])] * 4


def test_logprobs_are_the_unmodified_models(model: Decoder, hf: Reference) -> None:
    """Rows of one batch ask for none, none but their own, and several; some are modified."""
    prompt = prompt_of(33)
    asked: list[int | None] = [None, 0, 3, 20]
    shaped = with_(DRAWN, temperature=1.7, top_k=50, repetition_penalty=1.5, logit_bias={7: 2.0})
    requests = [submit(i, prompt, with_(shaped, logprobs=n)) for i, n in enumerate(asked)]
    news = run(make_engine(model), requests)
    answer = tokens(news[0, 0])
    wanted = hf_logprobs(hf, [*prompt, *answer])[len(prompt) - 1 : -1]
    for request_id, alternatives in enumerate(asked):
        outputs = news[request_id, 0]
        assert tokens(outputs) == answer
        entries = [output.logprob for output in outputs if output.logprob is not None]
        if alternatives is None:
            assert entries == []
        else:
            check_entries(entries, wanted, answer, alternatives)


@pytest.mark.parametrize("tight", [False, True])
def test_repetition_penalty_is_that_of_transformers(
    model: Decoder, hf: Reference, tight: bool
) -> None:
    prompts = [prompt_of(length, length) for length in (30, 45, 50)]
    params = with_(GREEDY, max_tokens=100, repetition_penalty=1.3)
    wanted = [hf_greedy(hf, prompt, 100, repetition_penalty=1.3) for prompt in prompts]
    assert wanted[0] != hf_greedy(hf, prompts[0], 100)
    engine = make_engine(model, pages=5 if tight else 64)
    assert generate(engine, prompts, params) == wanted
    assert (engine.stats.preemptions > 0) == tight


def test_presence_and_frequency_penalties_count_the_answer_alone(
    model: Decoder, hf: Reference
) -> None:
    prompt = prompt_of(20)
    params = with_(GREEDY, presence_penalty=0.8, frequency_penalty=0.5)
    answer: list[int] = []
    for _ in range(GREEDY.max_tokens):
        scores = hf_logprobs(hf, prompt + answer)[-1]
        counts = torch.tensor(answer, dtype=torch.int64).bincount(minlength=len(scores))
        answer.append(int((scores - 0.5 * counts - 0.8 * (counts > 0)).argmax()))
    assert answer != hf_greedy(hf, prompt, GREEDY.max_tokens)
    assert generate(make_engine(model), [prompt], params) == [answer]


def test_a_request_id_used_again_counts_its_own_tokens(model: Decoder) -> None:
    engine, params = make_engine(model), with_(GREEDY, repetition_penalty=1.5)
    first, second = prompt_of(20), prompt_of(20, 1)
    fresh = generate(make_engine(model), [second], params)
    generate(engine, [first], params)
    assert generate(engine, [second], params) == fresh


def fail_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, late: bool) -> None:
    """Lets the next step fail: at launch, or when its results are read."""
    runner = engine._runner
    launch = runner.launch

    def broken() -> list[object]:
        monkeypatch.setattr(runner, "launch", launch)
        raise RuntimeError("out of luck\nand more")

    def failing(plan: StepPlan) -> Launched:
        return dataclasses.replace(launch(plan), results=broken) if late else broken()  # type: ignore[return-value, arg-type]

    monkeypatch.setattr(runner, "launch", failing)


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_step_fails_its_own_requests(
    model: Decoder, hf: Reference, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    engine = make_engine(model, max_running=2)
    prompts = [prompt_of(80, i) for i in range(4)]
    for i, prompt in enumerate(prompts):
        engine.submit(submit(i, prompt, GREEDY))
    engine.receive()
    engine.step()
    fail_once(engine, monkeypatch, late=late)
    failed = engine.step() or []
    assert {output.request_id for output in failed} == {0, 1}
    assert {output.finish for output in failed} == {FinishReason.FAILED}
    assert {output.error for output in failed} == {"RuntimeError: out of luck"}
    assert engine.scheduler.pool.in_use == 0
    news = run(engine, [submit(9, prompts[0], GREEDY)])
    assert set(news) == {(2, 0), (3, 0), (9, 0)}
    for request_id, prompt in ((2, prompts[2]), (3, prompts[3]), (9, prompts[0])):
        assert tokens(news[request_id, 0]) == hf_greedy(hf, prompt, GREEDY.max_tokens)


@pytest.mark.parametrize("length", [0, 129, 1000])
def test_a_prompt_that_cannot_be_computed_fails_alone(
    model: Decoder, hf: Reference, length: int
) -> None:
    """An engine of 128 tokens; the gateway refuses such prompts, another peer might not."""
    engine = make_engine(model, pages=2)
    good = prompt_of(10)
    engine.submit(submit(0, good, GREEDY))
    engine.submit(submit(1, prompt_of(length), GREEDY))
    engine.submit(submit(2, good, GREEDY))
    news: list[TokenOutput] = []
    for _ in range(60):
        news += [*(engine.receive() or ()), *(engine.step() or ())]
    ends = {output.request_id: output.finish for output in news if output.finish is not None}
    assert ends == {0: FinishReason.LENGTH, 1: FinishReason.FAILED, 2: FinishReason.LENGTH}
    [error] = [output.error for output in news if output.error]
    assert error == f"a prompt of {length} tokens cannot be computed; send 1 to 127"


def test_a_failed_step_generates_nothing(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    fail_once(engine, monkeypatch, late=False)
    run(engine, [submit(0, prompt_of(5), GREEDY, n=1)])
    assert engine.stats.generated_tokens == 0


@pytest.mark.parametrize(
    "length",
    [
        50,
        51,
        120,
    ],
)
def test_prompt_tokens_are_counted_once(model: Decoder, length: int) -> None:
    """Each is either computed or found."""
    engine = make_engine(model, max_running=4, step_tokens=50)
    for request_id in range(2):
        run(engine, [submit(request_id, prompt_of(length), GREEDY)])
    assert engine.stats.generated_tokens == 2 * GREEDY.max_tokens
    assert engine.stats.prompt_tokens + engine.stats.cached_tokens == 2 * length


def test_tokens_that_cannot_be_taken_in_end_the_engine(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some samples of the step may have ended, and nobody would ever say so."""
    engine = make_engine(model)
    engine.submit(submit(0, prompt_of(5), GREEDY))
    engine.receive()

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(engine.scheduler, "commit", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        engine.step()

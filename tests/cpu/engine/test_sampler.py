"""The sampler against plain arithmetic on lists, one row at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from fourfold.engine.answers import fetch_drawn
from fourfold.engine.messages import SamplingParams
from fourfold.engine.program import StepOutputs
from fourfold.engine.sampler import likeliest, logprobs, penalises, sample_row
from fourfold.kernels import sample as kernel
from fourfold.kernels.sample import SampleParams, TokenTables, noise_key, uniform_numbers

CPU = torch.device("cpu")
LARGEST = 1 - 2**-53
MASK = (1 << 64) - 1


class SampledRow(NamedTuple):
    """A row that draws at a number of the test's choice."""

    params: SamplingParams
    uniform: float
    slot: int


def counts_for(vocabulary: int, slots: int = 8) -> TokenTables:
    return TokenTables(slots, vocabulary, CPU)


def sample(logits_SV: Tensor, rows: Sequence[SampledRow], tables: TokenTables) -> Tensor:
    """The verb as the engine calls it, but for the keys."""
    packed = []
    for params, number, slot in rows:
        row = sample_row(params, seed=0, index=0, position=0, slot=slot)
        packed.append(row._replace(key=key_of(number)))
    params_S = SampleParams.pack(packed, CPU)
    wanted = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
    torch.testing.assert_close(params_S.uniform, wanted, rtol=0, atol=2**-53)
    return kernel.sample(logits_SV, params_S, tables).tokens_S


def key_of(number: float) -> int:
    """The key that gives this number at position 0: the hash backwards."""
    x = int(number * 2**53) << 11
    for _ in range(2):
        x = _unshifted(x, 31)
        x = _unshifted(x * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK, 27)
        x = _unshifted(x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK, 30)
        x = (x - 0x9E3779B97F4A7C15) & MASK
    return x - (1 << 64) if x >> 63 else x


def _unshifted(mixed: int, bits: int) -> int:
    """The x of which `mixed` is x ^ (x >> bits)."""
    x = mixed
    for _ in range(64 // bits):
        x = mixed ^ (x >> bits)
    return x


def uniform(seed: int, index: int, position: int) -> float:
    return uniforms([(seed, index, position)])[0]


def uniforms(rows: Sequence[tuple[int, int, int]]) -> list[float]:
    """Numbers of (seed, index, position)."""
    keys = torch.tensor([noise_key(seed, index) for seed, index, _ in rows])
    numbers: list[float] = uniform_numbers(keys, torch.tensor([row[2] for row in rows])).tolist()
    return numbers


def logits_of(values: Sequence[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def random_logits(seed: int, vocabulary: int = 30, spread: float = 2.0) -> list[float]:
    random = Random(seed)
    return logits_of([random.gauss(0, spread) for _ in range(vocabulary)])[0].tolist()


def softmax(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    masses = [math.exp(logit - peak) for logit in logits]
    return [mass / sum(masses) for mass in masses]


def filtered(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, top-k, top-p and min-p, each on what the last one left."""
    scaled = [logit / params.temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if params.top_k:
        order = order[: params.top_k]
    masses = dict(zip(order, softmax([scaled[token] for token in order]), strict=True))
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= params.top_p:
            break
        kept.append(token)
        mass += masses[token]
    kept = [token for token in kept if masses[token] >= params.min_p * masses[order[0]]]
    chosen = dict(zip(kept, softmax([scaled[token] for token in kept]), strict=True))
    return [chosen.get(token, 0.0) for token in range(len(logits))]


def check_draws(
    logits: Sequence[float],
    params: SamplingParams,
    probabilities: Sequence[float],
    counts: TokenTables | None = None,
) -> None:
    """The middle of each token's part of [0, 1) draws that token; so do the ends of the range."""
    starts = [sum(probabilities[:token]) for token in range(len(logits))]
    likely = [token for token, p in enumerate(probabilities) if p > 1e-5]
    middles = [starts[token] + probabilities[token] / 2 for token in likely]
    rows = [SampledRow(params, u, 0) for u in [*middles, 0.0, LARGEST]]
    logits_SV = logits_of(logits).expand(len(rows), -1)
    drawn = sample(logits_SV, rows, counts or counts_for(len(logits))).tolist()
    assert drawn[:-2] == likely
    support = [token for token, p in enumerate(probabilities) if p > 0]
    assert drawn[-2] == support[0]
    assert drawn[-1] in support


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.9])
@pytest.mark.parametrize("seed", range(3))
def test_temperature(seed: int, temperature: float) -> None:
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature)
    check_draws(logits, params, filtered(logits, params))


@pytest.mark.parametrize("top_k", [1, 2, 7, 29, 30, 31, 500])
def test_top_k(top_k: int) -> None:
    logits = random_logits(1)
    params = SamplingParams(top_k=top_k, temperature=1.5)
    wanted = filtered(logits, params)
    assert sum(p > 0 for p in wanted) == min(top_k, 30)
    check_draws(logits, params, wanted)


def test_top_k_keeps_all_that_are_as_likely_as_the_last() -> None:
    """Which of equals comes first must not depend on how a device sorts."""
    logits = [0.0, 3.0, 1.0, 1.0, 0.5, 1.0]
    check_draws(logits, SamplingParams(top_k=3), filtered(logits, SamplingParams(top_k=4)))


@pytest.mark.parametrize("keep", [1, 2, 5, 20, 29])
def test_top_p_keeps_the_smallest_set_that_reaches_it(keep: int) -> None:
    logits = random_logits(2)
    masses = sorted(softmax(logits), reverse=True)
    top_p = sum(masses[: keep - 1]) + masses[keep - 1] / 2
    params = SamplingParams(top_p=top_p)
    wanted = filtered(logits, params)
    assert sum(p > 0 for p in wanted) == keep
    check_draws(logits, params, wanted)


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_vanishing_top_p_keeps_the_likeliest(top_p: float) -> None:
    logits = random_logits(3)
    wanted = filtered(logits, SamplingParams(top_p=top_p))
    assert sum(p > 0 for p in wanted) == 1
    check_draws(logits, SamplingParams(top_p=top_p), wanted)


def test_top_p_of_a_distribution_flatter_than_the_first_look() -> None:
    """Thousands of tokens share the mass, so more are needed than are looked at first."""
    logits = random_logits(4, vocabulary=5000, spread=0.3)
    order = sorted(range(5000), key=lambda token: -logits[token])
    for keep in (1023, 1024, 1025, 3000):
        masses = softmax(logits)
        top_p = sum(masses[t] for t in order[: keep - 1]) + masses[order[keep - 1]] / 2
        wanted = filtered(logits, SamplingParams(top_p=top_p))
        kept = [token for token in range(5000) if wanted[token]]
        middles = {t: sum(wanted[:t]) + wanted[t] / 2 for t in (kept[0], kept[-1], order[keep - 1])}
        rows = [SampledRow(SamplingParams(top_p=top_p), u, 0) for u in middles.values()]
        logits_SV = logits_of(logits).expand(len(rows), -1)
        assert sample(logits_SV, rows, counts_for(5000)).tolist() == list(middles)


@pytest.mark.parametrize("keep", [1, 3, 11, 30])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(keep: int) -> None:
    logits = random_logits(5)
    ratios = [*sorted((logit - max(logits) for logit in logits), reverse=True), -100.0]
    params = SamplingParams(min_p=math.exp((ratios[keep - 1] + ratios[keep]) / 2))
    wanted = filtered(logits, params)
    assert sum(p > 0 for p in wanted) == keep
    check_draws(logits, params, wanted)


def test_filters_apply_in_the_order_they_are_listed() -> None:
    """Top-p of what top-k left, at the temperature asked for: any other order keeps other sets."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    params = SamplingParams(top_k=2, top_p=0.55, temperature=1.0)
    assert [p > 0 for p in filtered(logits, params)] == [True, False, False, False]
    check_draws(logits, params, filtered(logits, params))
    hot = SamplingParams(top_k=3, top_p=0.62, min_p=0.86, temperature=2.0)
    assert [p > 0 for p in filtered(logits, hot)] == [True, True, False, False]
    check_draws(logits, hot, filtered(logits, hot))


PROMPT, OUTPUT = [3, 4, 4, 9], [4, 7, 7, 7, 0]


def openai(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """`mu[j] - c[j] * frequency - (c[j] > 0) * presence`, then the bias."""
    return [
        logit
        - OUTPUT.count(token) * params.frequency_penalty
        - (token in OUTPUT) * params.presence_penalty
        + params.logit_bias.get(token, 0.0)
        for token, logit in enumerate(logits)
    ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.4),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=0.9),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(frequency_penalty=-0.5, presence_penalty=-0.3),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(logit_bias={2: 3.0, 7: -100.0, 11: 1}),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, logit_bias={7: 2.0}),
    ],
)
@pytest.mark.parametrize("stepwise", [False, True])
def test_penalties(params: SamplingParams, stepwise: bool) -> None:
    """Against transformers' repetition penalty and OpenAI's formula, in the order documented."""
    logits = random_logits(6, vocabulary=12)
    assert min(logits) < 0 < max(logits)
    ids = torch.tensor([[*PROMPT, *OUTPUT]])
    repetition = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    wanted = softmax(openai(repetition(ids, logits_of(logits))[0].tolist(), params))
    counts = counts_for(12)
    counts.start(0, [5, 5], [1, 2], {5: 9.0})  # whoever had the slot before
    counts.start(0, PROMPT, OUTPUT[:0] if stepwise else OUTPUT, params.logit_bias)
    for token in OUTPUT if stepwise else ():
        counts.add(torch.tensor([0]), torch.tensor([token]))
    check_draws(logits, params, wanted, counts)


def test_penalties_of_one_row_do_not_touch_another() -> None:
    counts = counts_for(4)
    counts.start(1, [0], [], {})
    counts.start(2, [], [], {2: 50.0})
    counts.start(3, [], [1], {})
    logits_SV = torch.tensor([[2.0, 1.9, 0.0, 0.0]]).repeat(4, 1)
    before = logits_SV.clone()
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=2.0),
        SamplingParams(temperature=0.0, logit_bias={2: 50.0}),
        SamplingParams(temperature=0.0, presence_penalty=-1.0),
    ]
    rows = [SampledRow(p, 0.5, slot) for slot, p in enumerate(params)]
    assert sample(logits_SV, rows, counts).tolist() == [0, 1, 2, 1]
    assert torch.equal(logits_SV, before)
    assert [penalises(p) for p in params] == [False, True, False, True]


def test_frequencies_match_the_distribution() -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2, -0.3, 0.9]
    draws = 20_000
    params = SamplingParams()
    numbers = uniforms([(7, 0, position) for position in range(draws)])
    rows = [SampledRow(params, number, 0) for number in numbers]
    drawn = sample(logits_of(logits).expand(draws, -1), rows, counts_for(10))
    check_frequencies(drawn.bincount(minlength=10).tolist(), softmax(logits))


def check_frequencies(seen: Sequence[int], probabilities: Sequence[float]) -> None:
    """Pearson's test; a true sampler fails it once in ten thousand seeds."""
    draws = sum(seen)
    statistic = sum(
        (count - draws * p) ** 2 / (draws * p) for count, p in zip(seen, probabilities, strict=True)
    )
    freedom = torch.tensor((len(seen) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)).item() > 1e-4


@pytest.mark.parametrize(
    "numbers",
    [
        uniforms([(1, 0, position) for position in range(16_000)]),
        uniforms([(seed, 0, 5) for seed in range(16_000)]),
        uniforms([(1, index, 5) for index in range(16_000)]),
        uniforms([(seed << 40, 0, 5) for seed in range(16_000)]),
    ],
    ids=["positions", "seeds", "samples", "high seeds"],
)
def test_uniform_numbers_are_spread(numbers: list[float]) -> None:
    """Alone, and each beside the next: neighbours must not follow each other."""
    cells, pairs = [0] * 64, [0] * 64
    for number, following in itertools.pairwise(numbers):
        cells[int(number * 64)] += 1
        pairs[int(number * 8) * 8 + int(following * 8)] += 1
    check_frequencies(cells, [1 / 64] * 64)
    check_frequencies(pairs, [1 / 64] * 64)
    assert len(set(numbers)) == len(numbers)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 200), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_uniform_numbers_are_in_range_and_repeatable(seed: int, index: int, position: int) -> None:
    number = uniform(seed, index, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, index, position)
    others = {uniform(seed + 1, index, position), uniform(seed, index + 1, position)}
    assert number not in others | {uniform(seed, index, position + 1)}


def random_params(random: Random) -> SamplingParams:
    return SamplingParams(
        temperature=random.choice([0.0, 0.2, 1.0, 1.7]),
        top_k=random.choice([0, 0, 1, 5, 40, 1200]),
        top_p=random.choice([1.0, 1.0, 0.1, 0.9, 0.999]),
        min_p=random.choice([0.0, 0.0, 0.05, 0.5]),
        repetition_penalty=random.choice([1.0, 1.0, 1.3]),
        presence_penalty=random.choice([0.0, 0.0, 0.6]),
        frequency_penalty=random.choice([0.0, 0.0, -0.4]),
        logit_bias=random.choice([{}, {}, {3: 2.5, 100: -1.0}]),
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_row_draws_the_same_alone_and_in_a_batch(seed: int) -> None:
    random = Random(seed)
    vocabulary = random.choice([200, 1500])
    counts = counts_for(vocabulary)
    rows = []
    for slot in range(8):
        tokens = [random.randrange(vocabulary) for _ in range(60)]
        params = random_params(random)
        counts.start(slot, tokens[:30], tokens[30:], params.logit_bias)
        rows.append(SampledRow(params, random.random(), slot))
    spreads = torch.tensor([random.choice([0.1, 1.0, 5.0]) for _ in rows])[:, None]
    generator = torch.Generator().manual_seed(seed)
    logits_SV = torch.randn(8, vocabulary, generator=generator) * spreads
    together = sample(logits_SV, rows, counts)
    alone = [sample(logits_SV[i : i + 1], [row], counts).item() for i, row in enumerate(rows)]
    assert together.tolist() == alone
    assert sample(logits_SV[3:6], rows[3:6], counts).tolist() == alone[3:6]


def test_greedy_rows_beside_drawn_ones() -> None:
    logits_SV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.0) for i in range(20)]
    rows = [SampledRow(p, 0.4, slot) for slot, p in enumerate(params)]
    drawn = sample(logits_SV, rows, counts_for(50, 20))
    assert torch.equal(drawn[1::2], logits_SV.argmax(-1)[1::2])
    assert not torch.equal(drawn[::2], logits_SV.argmax(-1)[::2])


@pytest.mark.parametrize("u", [0.0, 0.5, LARGEST])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1e-60])
def test_a_tiny_temperature_is_greedy(temperature: float, u: float) -> None:
    """The gateway admits every temperature in [0, 2]."""
    logits = random_logits(8, spread=10.0)
    row = SampledRow(SamplingParams(temperature=temperature), u, 0)
    drawn = sample(logits_of(logits), [row], counts_for(30)).item()
    assert drawn == max(range(30), key=logits.__getitem__)


def test_a_tiny_temperature_is_greedy_between_close_logits() -> None:
    """1e-5 apart at temperature 1e-6: the likelier has 22000 times the mass."""
    row = SampledRow(SamplingParams(temperature=1e-6), 0.1, 0)
    assert sample(logits_of([1.0, 1.0 + 1e-5]), [row], counts_for(2)).item() == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=5, top_p=0.999999, min_p=1.0, temperature=0.01),
        SamplingParams(repetition_penalty=1.5, presence_penalty=2.0, frequency_penalty=2.0),
    ],
)
@pytest.mark.parametrize("u", [0.0, 0.5, LARGEST])
def test_one_possible_token_is_drawn(params: SamplingParams, u: float) -> None:
    logits = [-math.inf] * 20
    logits[13] = -4.0
    counts = counts_for(20)
    counts.start(0, [13, 2], [13], {})
    assert sample(logits_of(logits), [SampledRow(params, u, 0)], counts).item() == 13


@pytest.mark.parametrize("alternatives", [0, 1, 6, 30])
def test_logprobs(alternatives: int) -> None:
    logits_SV = torch.tensor([random_logits(seed) for seed in range(4)])
    tokens_S = torch.tensor([0, 29, 13, 5])
    chosen_S, top = logprobs(logits_SV, tokens_S, alternatives)
    wanted = logits_SV.double().log_softmax(-1)
    assert chosen_S.shape == (4,)
    assert top.values.shape == top.indices.shape == (4, alternatives)
    largest = wanted.sort(-1, descending=True).values[:, :alternatives]
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(chosen_S.double(), wanted[range(4), tokens_S], **close)
    torch.testing.assert_close(top.values.double(), largest, **close)
    torch.testing.assert_close(top.values.double(), wanted.gather(-1, top.indices), **close)
    for mine, theirs in zip(likeliest(logits_SV, alternatives), top, strict=True):
        assert torch.equal(mine, theirs)


def test_a_token_has_one_log_probability() -> None:
    """The kernel that draws sums the logits in another order than what finds the likeliest."""
    logits_SV = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    exact_V = logits_SV[0].log_softmax(-1)
    tokens_S = torch.tensor([2, 0, 2])
    drawn = StepOutputs(None, logits_SV, tokens_S, exact_V[tokens_S] + 1e-5)
    among, beside, alone = fetch_drawn(drawn, [2, 1, 0])()
    for answer, token, rest in ((among, 2, 0.0), (beside, 0, 1e-5), (alone, 2, 1e-5)):
        assert answer.logprob is not None
        assert answer.logprob.logprob == pytest.approx(float(exact_V[token]) + rest, abs=1e-7)

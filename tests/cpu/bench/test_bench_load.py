"""Arrival times, the two loops, and the arithmetic of the figures, without a network."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.serve.answer import Failure
from fourfold.bench.serve.load import arrival_times, closed_loop, open_loop, unless
from fourfold.bench.serve.measure import (
    PERCENTILES,
    Outcome,
    peak_concurrency,
    percentile,
    summarize,
)

deterministic = settings(derandomize=True, deadline=None)


@deterministic
@given(
    count=st.integers(1, 50),
    rate=st.floats(0.01, 1e4),
    burstiness=st.floats(0.1, 10),
    seed=st.integers(),
)
def test_arrivals_are_a_schedule(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrival_times(count, rate, burstiness, random.Random(seed))
    assert len(times) == count
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == arrival_times(count, rate, burstiness, random.Random(seed))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_asked_for(burstiness: float) -> None:
    times = arrival_times(20_000, 8.0, burstiness, random.Random(0))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_burstiness_one_is_a_poisson_process() -> None:
    """Gaps are exponential, and counts per second vary as much as their mean."""
    times = arrival_times(20_000, 10.0, 1.0, random.Random(0))
    gaps = np.diff(times)
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(gaps, quantile) == pytest.approx(-math.log(1 - quantile) / 10, rel=0.05)
    counts = np.bincount(np.floor(times).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.1)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, random.Random(0)) == [0.0, 0.0, 0.0]


async def quick(body: bytes, due: float | None) -> Outcome:
    sent = time.perf_counter()
    await asyncio.sleep(0.001)
    return Outcome(due=sent if due is None else due, sent=sent, ended=time.perf_counter())


def test_the_open_loop_keeps_to_its_times() -> None:
    outcomes: list[Outcome] = []
    times = [0.0, 0.02, 0.021, 0.06]
    asyncio.run(open_loop(quick, [b""] * 4, times, outcomes.append))
    ordered = sorted(outcomes, key=lambda outcome: outcome.due)
    assert [o.due - ordered[0].due for o in ordered] == pytest.approx(times)
    assert all(o.sent >= o.due for o in outcomes), "sent before its time"


def test_enough_ends_arrivals_and_waits_for_those_under_way() -> None:
    outcomes: list[Outcome] = []

    async def until_the_third() -> None:
        enough = asyncio.Event()
        sent = 0

        async def ask(body: bytes, due: float | None) -> Outcome:
            nonlocal sent
            sent += 1
            if sent == 3:
                enough.set()
            await asyncio.sleep(0.05)
            return await quick(body, due)

        times = [0.0, 0.01, 0.02, 0.03, 1000.0]
        await open_loop(ask, [b""] * 5, times, outcomes.append, enough)

    asyncio.run(until_the_third())
    assert len(outcomes) == 3


def test_a_stalled_generator_counts_its_own_delay() -> None:
    """Coordinated omission: requests due during a stall are late, and their latency says so."""
    outcomes: list[Outcome] = []

    async def stalling(body: bytes, due: float | None) -> Outcome:
        if body == b"stall":
            time.sleep(0.1)
        outcome = await quick(body, due)
        return Outcome(due=outcome.due, sent=outcome.sent, ended=outcome.ended, first=outcome.ended)

    asyncio.run(open_loop(stalling, [b"stall", b"late"], [0.0, 0.01], outcomes.append))
    late = max(outcomes, key=lambda outcome: outcome.due)
    assert late.ttft is not None
    assert late.ttft > 0.09
    assert late.sent - late.due > 0.09


def test_the_closed_loop_keeps_its_concurrency() -> None:
    outcomes: list[Outcome] = []
    asyncio.run(closed_loop(quick, [b""] * 20, 3, outcomes.append))
    assert len(outcomes) == 20
    assert all(o.due == o.sent for o in outcomes)
    assert peak_concurrency(outcomes) <= 3


def test_stopping_cancels_the_work() -> None:
    outcomes: list[Outcome] = []

    async def stopped() -> None:
        stop = asyncio.Event()

        def record(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 5:
                stop.set()

        await unless(stop, closed_loop(quick, [b""] * 10_000, 2, record))
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(stopped())
    assert 5 <= len(outcomes) < 100


def test_an_error_in_the_work_is_not_lost() -> None:
    async def broken(body: bytes, due: float | None) -> Outcome:
        raise ZeroDivisionError

    async def work() -> None:
        await unless(asyncio.Event(), closed_loop(broken, [b""], 1, lambda outcome: None))

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(work())
    assert caught.group_contains(ZeroDivisionError)


@deterministic
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    percent=st.sampled_from(PERCENTILES),
)
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    expected = np.percentile(values, percent)
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def outcome(
    *,
    due: float,
    ttft: float,
    tpot: float = 0.0,
    tokens: int = 1,
    prompt_tokens: int | None = 10,
    late: float = 0.0,
) -> Outcome:
    first = due + ttft
    last = first + tpot * (tokens - 1)
    return Outcome(
        due=due,
        sent=due + late,
        ended=last,
        first=first,
        last=last,
        gaps=(tpot,) * (tokens - 1),
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
    )


def failed(kind: str, *, due: float, after: float) -> Outcome:
    return Outcome(
        due=due,
        sent=due,
        ended=due + after,
        first=due,
        last=due + after,
        output_tokens=99,
        failure=Failure(kind, ""),
    )


def test_the_figures_of_known_requests() -> None:
    outcomes = [
        outcome(due=0.0, ttft=0.5, tpot=0.125, tokens=9),
        outcome(due=1.0, ttft=1.5, tpot=0.25, tokens=5, late=0.5),
        outcome(due=2.0, ttft=1.0, tokens=1),
        failed("timeout", due=2.0, after=100.0),
        failed("http 429", due=2.0, after=0.0),
        failed("timeout", due=2.0, after=100.0),
    ]
    summary = summarize(outcomes, 10.0, slo_ttft=1.0, slo_tpot=0.125)
    assert (summary.completed, summary.failures) == (3, {"http 429": 1, "timeout": 2})
    assert summary.request_rate == pytest.approx(0.3)
    assert summary.input_rate == pytest.approx(3.0)
    assert summary.output_rate == pytest.approx(1.5)
    assert (summary.prompt_tokens, summary.output_tokens) == (10.0, 5.0)
    # The second missed both limits; the third has no TPOT to keep.
    assert summary.goodput == pytest.approx(0.2)
    assert summary.slo_attainment == pytest.approx(2 / 6)
    ttft = summary.latencies["ttft"]
    assert (ttft.mean, ttft.percentiles[50]) == (1.0, 1.0)
    assert ttft.percentiles[90] == pytest.approx(1.4)
    assert summary.latencies["tpot"].mean == pytest.approx((0.125 + 0.25) / 2)
    assert summary.latencies["itl"].mean == pytest.approx((8 * 0.125 + 4 * 0.25) / 12)
    assert summary.latencies["e2e"].percentiles[50] == pytest.approx(1.5)
    assert summary.latencies["lateness"].mean == pytest.approx(0.5 / 6)


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = outcome(due=1.0, ttft=0.75, late=0.5)
    assert (late.ttft, late.e2e, late.tpot) == (0.75, 0.75, None)


def test_a_run_in_which_all_failed_has_no_latency() -> None:
    summary = summarize([failed("connect", due=0.0, after=1.0)], 1.0, slo_ttft=1.0)
    assert set(summary.latencies) == {"lateness"}
    assert (summary.request_rate, summary.goodput, summary.slo_attainment) == (0.0, 0.0, 0.0)
    assert summary.output_tokens is None
    assert summary.input_rate is None


def test_unknown_prompt_lengths_make_no_input_rate() -> None:
    outcomes = [outcome(due=0, ttft=1), outcome(due=0, ttft=1, prompt_tokens=None)]
    summary = summarize(outcomes, 1.0, open_loop=False)
    assert (summary.input_rate, summary.prompt_tokens, summary.goodput) == (None, None, None)
    assert "lateness" not in summary.latencies


@deterministic
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), max_size=20))
def test_peak_concurrency_is_the_deepest_moment(spans: list[tuple[int, int]]) -> None:
    outcomes = [Outcome(due=s, sent=s, ended=s + length) for s, length in spans]
    depths = [sum(s <= moment < s + length for s, length in spans) for moment in range(31)]
    assert peak_concurrency(outcomes) == max(depths)


@deterministic
@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 50)), min_size=1, max_size=20),
    st.floats(0.001, 10),
)
def test_goodput_never_exceeds_throughput(pairs: list[tuple[float, int]], slo: float) -> None:
    outcomes = [outcome(due=0, ttft=ttft, tokens=tokens) for ttft, tokens in pairs]
    summary = summarize(outcomes, 2.0, slo_ttft=slo)
    within = sum(ttft <= slo for ttft, _ in pairs)
    assert summary.goodput == pytest.approx(within / 2.0)
    assert summary.goodput <= summary.request_rate
    spread = summary.latencies["ttft"]
    assert list(spread.percentiles.values()) == sorted(spread.percentiles.values())
    assert spread.mean == pytest.approx(statistics.fmean(ttft for ttft, _ in pairs))

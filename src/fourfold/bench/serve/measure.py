"""From timed requests to figures: pure arithmetic, nothing measured here.

Latencies are of successful requests only, and count from the moment a request was *due*: when a
generator or a server falls behind, the wait is part of the figure rather than left out of it
(coordinated omission). Failures are figures of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fourfold.bench.serve.answer import Failure

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request that ended. Times are `time.perf_counter()` seconds.

    `due` is the scheduled arrival (in a closed loop the sending), `sent` when the generator began
    on it, connecting included. `first`, `last` and `gaps` time the tokens. `output_tokens` is the
    server's count, or the number of events with text where `counted`.
    """

    due: float
    sent: float
    ended: float
    first: float | None = None
    last: float | None = None
    gaps: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    failure: Failure | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from due to the first token."""
        return None if self.first is None else self.first - self.due

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for an answer of one token."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float | None:
        """Seconds from due to the last token."""
        return None if self.last is None else self.last - self.due


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of one latency, in seconds."""

    mean: float
    percentiles: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one run. None where there is nothing to make the figure of.

    Rates are per second over `duration` (seconds): requests and tokens of successful requests.
    `goodput` counts those that also met the SLO, `slo_attainment` is their share of all requests
    that ended. `latencies` holds ttft, tpot, itl, e2e and, for an open loop, the lateness of the
    generator itself, as far as there are any.
    """

    duration: float
    completed: int
    failures: dict[str, int]
    request_rate: float
    input_rate: float | None
    output_rate: float
    prompt_tokens: float | None
    output_tokens: float | None
    goodput: float | None
    slo_attainment: float | None
    peak_concurrency: int
    latencies: dict[str, Spread]


def summarize(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    open_loop: bool = True,
    slo_ttft: float | None = None,
    slo_tpot: float | None = None,
) -> Summary:
    """The figures of `outcomes`, which ended within `duration` seconds."""
    done = [o for o in outcomes if o.failure is None]
    prompt_tokens = [o.prompt_tokens for o in done if o.prompt_tokens is not None]
    counts_known = bool(done) and len(prompt_tokens) == len(done)
    has_slo = slo_ttft is not None or slo_tpot is not None
    good = sum(meets(o, slo_ttft, slo_tpot) for o in done)
    samples: dict[str, list[float]] = {
        "ttft": [o.ttft for o in done if o.ttft is not None],
        "tpot": [o.tpot for o in done if o.tpot is not None],
        "itl": [gap for o in done for gap in o.gaps],
        "e2e": [o.e2e for o in done if o.e2e is not None],
        "lateness": [o.sent - o.due for o in outcomes] if open_loop else [],
    }
    output_tokens = sum(o.output_tokens for o in done)
    return Summary(
        duration=duration,
        completed=len(done),
        failures=dict(sorted(Counter(o.failure.kind for o in outcomes if o.failure).items())),
        request_rate=len(done) / duration,
        input_rate=sum(prompt_tokens) / duration if counts_known else None,
        output_rate=output_tokens / duration,
        prompt_tokens=sum(prompt_tokens) / len(done) if counts_known else None,
        output_tokens=output_tokens / len(done) if done else None,
        goodput=good / duration if has_slo else None,
        slo_attainment=good / len(outcomes) if has_slo and outcomes else None,
        peak_concurrency=peak_concurrency(outcomes),
        latencies={name: spread(values) for name, values in samples.items() if values},
    )


def meets(outcome: Outcome, slo_ttft: float | None, slo_tpot: float | None) -> bool:
    """Whether a successful request kept every limit given; one token alone has no TPOT to keep."""
    return all(
        limit is None or value is None or value <= limit
        for value, limit in ((outcome.ttft, slo_ttft), (outcome.tpot, slo_tpot))
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and percentiles of at least one value."""
    ordered = sorted(values)
    return Spread(
        math.fsum(ordered) / len(ordered), {p: percentile(ordered, p) for p in PERCENTILES}
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, by linear interpolation between the two nearest (as numpy does)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def peak_concurrency(outcomes: Iterable[Outcome]) -> int:
    """The most requests that were under way at one moment."""
    # A request that ends as another begins is not beside it: ends sort before begins.
    moments = sorted(moment for o in outcomes for moment in ((o.sent, 1), (o.ended, -1)))
    peak = running = 0
    for _, change in moments:
        running += change
        peak = max(peak, running)
    return peak

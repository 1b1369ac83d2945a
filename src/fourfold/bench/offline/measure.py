"""From runs of one engine to the figures of one case, and what an engine must be able to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from fourfold.bench.offline.cases import LONG_ANSWER, SHORT_ANSWER, Case, Kind
from fourfold.bench.record import Result
from fourfold.bench.serve.measure import spread
from fourfold.errors import ConfigError

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """How requests that arrived together were answered; seconds since they arrived."""

    first: float
    """Until every one of them had its first token."""
    whole: float
    """Until the last of them ended."""
    ttft: tuple[float, ...] = ()
    """Until each had its first token, where the engine says so."""
    tpot: tuple[float, ...] = ()
    """Mean time of each one's further tokens."""


class Contestant(Protocol):
    """A loaded engine."""

    @property
    def version(self) -> str:
        """The engine and what of it this is."""
        ...

    @property
    def batches(self) -> bool:
        """Whether it answers several prompts at once."""
        ...

    def answer(self, prompts: Prompts, tokens: int) -> Answered:
        """Answers token ids with so many tokens each, whatever they are."""
        ...

    def complete(self, case: Case, results: Sequence[Result]) -> list[Result]:
        """The figures of a case with what only this engine can add, its last run being of it."""
        ...


def measure(contestant: Contestant, case: Case, prompts: Prompts) -> list[Result]:
    """The figures of a case. One run like the longest warms up caches, allocators and graphs.
    ConfigError where a busy machine hides what a token takes."""
    contestant.answer(prompts, case.output_tokens)
    figures = {Kind.PREFILL: _prefill, Kind.DECODE: _decode, Kind.REQUESTS: _requests}
    results = [
        Result(case=case.title, metric=metric, value=value, unit=unit)
        for metric, (value, unit) in figures[case.kind](contestant, case, prompts).items()
    ]
    return contestant.complete(case, results)


_Figures = dict[str, tuple[float, str]]


def _prefill(contestant: Contestant, case: Case, prompts: Prompts) -> _Figures:
    seconds = min(contestant.answer(prompts, 1).first for _ in range(2))
    tokens = case.requests * case.prompt_tokens
    return {"prefill": (tokens / seconds, "tok/s"), "first token": (seconds, "s")}


def _decode(contestant: Contestant, case: Case, prompts: Prompts) -> _Figures:
    short = contestant.answer(prompts, SHORT_ANSWER).whole
    slope = (contestant.answer(prompts, LONG_ANSWER).whole - short) / (LONG_ANSWER - SHORT_ANSWER)
    if slope <= 0:
        raise ConfigError(
            f"{case.title}: {LONG_ANSWER} tokens took no longer than {SHORT_ANSWER}; "
            "measure on a machine that does nothing else"
        )
    return {"tpot": (slope, "s"), "decode": (case.requests / slope, "tok/s")}


def _requests(contestant: Contestant, case: Case, prompts: Prompts) -> _Figures:
    answered = contestant.answer(prompts, case.output_tokens)
    figures = {
        "output rate": (case.requests * case.output_tokens / answered.whole, "tok/s"),
        "whole": (answered.whole, "s"),
    }
    for name, values in (("ttft", answered.ttft), ("tpot", answered.tpot)):
        if values:
            percentiles = spread(values).percentiles
            figures |= {f"{name} p{p}": (percentiles[p], "s") for p in (50, 99)}
    return figures

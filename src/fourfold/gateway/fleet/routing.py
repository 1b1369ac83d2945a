"""Which workers compute a request: pure functions over what is known of them now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from fourfold.engine.messages import Role

_EXPECTED_ANSWER = 256
"""Tokens for which pages should be free where an answer begins; more come free meanwhile."""


class Route(NamedTuple):
    """The workers of one part of a request, by number; one alone if both are the same."""

    prefill: int
    decode: int

    @property
    def whole(self) -> bool:
        return self.prefill == self.decode


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that takes requests, as far as routing cares."""

    number: int
    role: Role
    max_context: int
    page_tokens: int
    pages_free: int
    """Without an owner, and not promised to parts that are on their way."""
    samples: int
    """Held there now, running or waiting."""
    queued_tokens: int
    """Of prompts that are there and not computed yet."""
    prompt_rate: float
    """Prompt tokens per second that it was seen to compute."""
    token_rate: float
    """Tokens of answers per second that it was seen to compute, over all samples."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a request, as far as routing cares."""

    tokens: int
    """Known already: the prompt's, and those of an answer that goes on."""
    prompt_tokens: int
    max_tokens: int
    n: int = 1
    uncut: bool = False
    """Whether one worker must compute all of it."""
    found: Mapping[int, int] = {}
    """Pages of it that each worker should still have."""


def choose_route(
    asked: Asked, workers: Sequence[WorkerView], avoided: Collection[Route] = ()
) -> Route | None:
    """The best route now, or None where no worker can hold the request.

    Pairs in `avoided` are not cut between.
    """
    fit = [
        worker for worker in workers if asked.prompt_tokens + asked.max_tokens <= worker.max_context
    ]
    if not fit:
        return None
    prefilling = [worker for worker in fit if worker.role is not Role.DECODE]
    decoding = [worker for worker in fit if worker.role is not Role.PREFILL]
    if not prefilling or not decoding:
        return _whole(asked, fit)
    if asked.uncut:
        return _whole(asked, prefilling)
    for first in sorted(prefilling, key=lambda worker: _prompt_cost(asked, worker)):
        partners = [
            worker
            for worker in decoding
            if _may_pair(first, worker) and Route(first.number, worker.number) not in avoided
        ]
        if partners:
            last = min(partners, key=lambda worker: _answer_cost(asked, worker))
            if _uncached(asked, last) <= last.page_tokens:
                return Route(last.number, last.number)
            return Route(first.number, last.number)
    return _whole(asked, decoding)


def lacks_a_role(workers: Sequence[WorkerView]) -> Role | None:
    """The role that nobody has, if there are workers at all."""
    roles = {worker.role for worker in workers}
    if not roles or Role.BOTH in roles:
        return None
    missing = {Role.PREFILL, Role.DECODE} - roles
    return next(iter(missing), None)


def first_token_seconds(asked: Asked, worker: WorkerView) -> float:
    """When a worker would have the next token: after the prompts before this one, and one token of
    everybody who decodes meanwhile."""
    tokens = worker.queued_tokens + _uncached(asked, worker)
    return tokens / worker.prompt_rate + worker.samples / worker.token_rate


def _uncached(asked: Asked, worker: WorkerView) -> int:
    return max(1, asked.tokens - asked.found.get(worker.number, 0) * worker.page_tokens)


def _may_pair(first: WorkerView, last: WorkerView) -> bool:
    """Whether one's prompts are for the other to answer. A worker that takes both leaves answers
    only to those that do nothing else."""
    if first.role is Role.PREFILL or last.role is Role.DECODE:
        return True
    return first.number == last.number


def _whole(asked: Asked, workers: Sequence[WorkerView]) -> Route:
    best = min(workers, key=lambda worker: _prompt_cost(asked, worker))
    return Route(best.number, best.number)


def _prompt_cost(asked: Asked, worker: WorkerView) -> tuple[bool, float, int]:
    """What a prompt would wait for at a worker, the best first."""
    crowded = worker.role is not Role.PREFILL and not _has_room(asked, worker)
    return crowded, first_token_seconds(asked, worker), worker.number


def _answer_cost(asked: Asked, worker: WorkerView) -> tuple[bool, float, int, int]:
    """What the answer would wait for at a worker, the best first. Where that is the same, what is
    there already need not be sent."""
    load = (worker.samples + asked.n) / worker.token_rate
    return (
        not _has_room(asked, worker),
        load,
        -asked.found.get(worker.number, 0),
        worker.number,
    )


def _has_room(asked: Asked, worker: WorkerView) -> bool:
    return worker.pages_free >= pages_wanted(asked, worker)


def pages_wanted(asked: Asked, worker: WorkerView) -> int:
    """Pages that a part should find free: its prompt's, and some for each of its answers."""
    answer = min(asked.max_tokens, _EXPECTED_ANSWER)
    prompt = -(-asked.tokens // worker.page_tokens) - asked.found.get(worker.number, 0)
    return max(0, prompt) + asked.n * -(-answer // worker.page_tokens)

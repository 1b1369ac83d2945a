"""What runs say before any form is fitted: how much size and sparsity are worth, and whether their
losses move as those of a law do.

A sum of power laws falls with size and with tokens, and ever slower in the logarithm of tokens.
Runs that do otherwise are not yet, or no longer, what such a sum describes, however well it fits.

Shapes: N runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from fourfold.train.law.fitting import Fit
from fourfold.train.law.records import RunRecord

_SAME_TOKENS = 1.02
_TOLERANCE = 1e-3
"""Relative differences of losses below this are not spoken of."""
_MOST_MISFIT = 1.5
_NAMED = 3


class Checks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of all runs together; pairs are the least and the most."""

    runs: int
    chains: int
    seeds: int
    active: tuple[int, int]
    ratios: tuple[int, ...]
    tokens: tuple[int, int]
    steps: tuple[int, int] | UnsetType = UNSET
    size_power: float
    """Of dense models on as many tokens, loss falls like active parameters to this power."""
    sparse_gain: float
    """How much less than its dense twin a sparse model loses, median, as a share."""
    seed_noise: float | UnsetType = UNSET
    """Standard deviation of the loss between seeds, as a share; absent where all have one seed."""
    doubts: tuple[str, ...]
    """What scaling laws do not do, and these runs do."""


def check(records: Sequence[RunRecord]) -> Checks:
    """`records` with dense and sparse ones."""
    steps = [record.steps for record in records if record.steps is not None]
    gains = list(_gains(records))
    return Checks(
        runs=len(records),
        chains=len({record.chain for record in records}),
        seeds=len({record.seed for record in records}),
        active=_range([record.active for record in records]),
        ratios=tuple(sorted({record.ratio for record in records})),
        tokens=_range([record.tokens for record in records]),
        steps=_range(steps) if steps else UNSET,
        size_power=size_power(records),
        sparse_gain=float(1 - np.exp(-np.median([gain for _, gain in gains]))) if gains else 0.0,
        seed_noise=_seed_noise(records),
        doubts=tuple(_doubts(records)),
    )


def _range(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def by_tokens(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs on about as many tokens, fewest first."""
    groups: list[list[RunRecord]] = []
    for record in sorted(records, key=lambda record: record.tokens):
        if groups and record.tokens <= _SAME_TOKENS * groups[-1][0].tokens:
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


def dense_curve(records: Sequence[RunRecord]) -> tuple[list[int], list[float]]:
    """Sizes of the dense ones of runs on as many tokens, growing, and their losses, seeds
    averaged."""
    found: dict[int, list[float]] = {}
    for record in records:
        if record.ratio == 1:
            found.setdefault(record.active, []).append(record.loss)
    sizes = sorted(found)
    return sizes, [float(np.mean(found[size])) for size in sizes]


def size_power(records: Sequence[RunRecord]) -> float:
    """The power of size that dense losses on as many tokens fall like, by least squares; 0 where no
    two sizes were run."""
    both, square = 0.0, 0.0
    for group in by_tokens(records):
        sizes, losses = dense_curve(group)
        if len(sizes) < 2:
            continue
        size_N, loss_N = np.log(sizes), np.log(losses)
        both += float(((size_N - size_N.mean()) * loss_N).sum())
        square += float(np.square(size_N - size_N.mean()).sum())
    return -both / square if square else 0.0


def misfit(fit: Fit, power: float) -> float:
    """The factor in model size that changes losses as much as the fit's residuals do on average,
    for losses that fall like size to `power`: sizes that are read from the fit are off by so much.
    Infinite where size changes nothing."""
    share = float(np.abs(fit.residual_N).mean())
    return math.exp(min(share / power, 700.0)) if power > 0 else math.inf


def tells_size(fit: Fit, records: Sequence[RunRecord]) -> bool:
    """Whether a size may be read from a fit: the runs tell its exponent, and it describes them."""
    return "a" not in fit.untold and misfit(fit, size_power(records)) <= _MOST_MISFIT


def _gains(records: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, float]]:
    """Sparse runs, and the logarithm of their dense twin's loss over theirs."""
    for group in by_tokens(records):
        for record in group:
            if record.ratio > 1 and (twins := dense_twins(record, group)):
                dense = float(np.mean([twin.loss for twin in twins]))
                yield record, math.log(dense / record.loss)


def dense_twins(sparse: RunRecord, records: Sequence[RunRecord]) -> list[RunRecord]:
    """The dense ones of runs that are a sparse one but for its router and the experts that a token
    does not choose, whatever the grid calls them; of several numbers of tokens or seeds if the
    records are."""
    router = sparse.layers * sparse.width * sparse.ratio * sparse.chosen
    found = [
        (abs(record.active + router - sparse.active), record)
        for record in records
        if record.ratio == 1 and (record.layers, record.width) == (sparse.layers, sparse.width)
    ]
    # Not all layers need have a router, so that twins may differ by less than all of them.
    nearest = min((off for off, _ in found if off <= router), default=None)
    return [record for off, record in found if off == nearest]


def _seed_noise(records: Sequence[RunRecord]) -> float | UnsetType:
    squares, freedom = 0.0, 0
    for group in by_tokens(records):
        alike: dict[tuple[str, int], list[float]] = {}
        for record in group:
            alike.setdefault((record.model, record.ratio), []).append(math.log(record.loss))
        for losses in alike.values():
            squares += float(np.square(np.array(losses) - np.mean(losses)).sum())
            freedom += len(losses) - 1
    return math.sqrt(squares / freedom) if freedom else UNSET


def _doubts(records: Sequence[RunRecord]) -> Iterator[str]:
    chains: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.tokens):
        chains.setdefault(record.chain, []).append(record)
    rising = [
        name
        for name, chain in chains.items()
        if any(later.loss > _more(before.loss) for before, later in itertools.pairwise(chain))
    ]
    if rising:
        yield f"{_some(rising)} of {len(chains)} models lose more on more tokens"
    bent = [name for name, chain in chains.items() if _is_concave(chain)]
    if bent:
        yield (
            f"{_some(bent)} of {len(chains)} models gain more from a doubling of tokens than from "
            "the one before: their losses are not convex in log tokens as power laws are; train "
            "for more steps, on smaller batches or more tokens"
        )
    worse = []
    for group in by_tokens(records):
        sizes, losses = dense_curve(group)
        name = {record.active: record.model for record in group}
        worse += [
            f"{name[sizes[i + 1]]} than {name[sizes[i]]} on {group[-1].tokens / 1e6:.3g}M tokens"
            for i in range(len(sizes) - 1)
            if losses[i + 1] > _more(losses[i])
        ]
    if worse:
        yield f"larger dense models lose more: {'; '.join(worse)}"
    gains = list(_gains(records))
    if useless := [record.name for record, gain in gains if gain <= 0]:
        yield f"{_some(useless)} of {len(gains)} sparse runs lose no less than their dense twin"


def _more(loss: float) -> float:
    return loss * (1 + _TOLERANCE)


def _is_concave(chain: Sequence[RunRecord]) -> bool:
    """Whether a loss lies above the straight line, in log tokens, between those beside it."""
    for before, middle, after in zip(chain, chain[1:], chain[2:], strict=False):
        tokens = [math.log(record.tokens) for record in (before, middle, after)]
        if tokens[0] < tokens[1] < tokens[2]:
            way = (tokens[1] - tokens[0]) / (tokens[2] - tokens[0])
            if middle.loss > _more((1 - way) * before.loss + way * after.loss):
                return True
    return False


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = ", .." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NAMED])}{more})"

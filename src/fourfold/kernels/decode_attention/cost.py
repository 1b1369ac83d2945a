"""What a decode-attention plan costs, in seconds: a model with few coefficients, fitted to
measurements of one GPU.

    t = start + full + (alone ^ 2 + last ^ 2) ^ (1 / 2) + merge

Tasks run in waves, as many at once as fit on the GPU. `full` is what the waves before the last ask
of the memory, `last` the same of the last wave, and `alone` is its longest task, which waits for
page after page. The larger of these two counts, and both where they are near each other. Where the
last wave has short tasks only, these find room beside longer ones; so no plan costs less than all
of its tasks as one wave would. `merge` is one kernel up to some partials of a row and two beyond,
as `choose.most_at_once` says.
All coefficients but those of kernels and pages that are waited for belong to a head width of 128
and scale with the bytes of a page of one KV head.

Shapes: K candidate plans, F coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.pages.layout import PAGE_TOKENS

Floats = NDArray[np.float64]
_HEAD_WIDTH = 128
_SHARPNESS = 2
_TURNS = 40
_PAGE_BYTES = 2 * PAGE_TOKENS * _HEAD_WIDTH
_CACHE_GAIN = 4
"""How many times as fast as the memory the L2 cache reads, at most."""


class Work(NamedTuple):
    """What the model knows of a plan; numbers or arrays [K] of several plans.

    Pages are those of one KV head.
    """

    steps: Floats
    """1."""
    further: Floats
    """Kernels besides the first, the merge not counted."""
    full: Floats
    """The part of all reads that lies in the waves before the last, 0..1."""
    longest: Floats
    """Pages of the longest task of the last wave."""
    longest_rows: Floats
    """Most rows times pages of such a task, rows being those of its tile."""
    longest_of_all: Floats
    """Pages of the longest task of all waves."""
    longest_rows_of_all: Floats
    """The same of rows times pages."""
    many: Floats
    """1 where the kernel is made for many programs, 0 where it is made for few."""
    second_pages: Floats
    """1 where a kernel made for few programs has a task of several pages."""
    pages: Floats
    """Different pages."""
    rereads: Floats
    """Reads of pages beyond the first of each."""
    row_pages: Floats
    """Rows times pages, summed over tasks."""
    opened: Floats
    """Open pages."""
    opened_beside: Floats
    """The same where a kernel made for few programs has a task of several pages."""
    partials: Floats
    """Partial results, one of a query head each."""
    merges: Floats
    """1 where anything is merged."""
    merged: Floats
    """Most partials of one row; 0 where nothing is merged."""
    coded_apart: Floats
    """1 where these are so many that another kernel than the one that merges codes the row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """Coefficients in seconds, of a GPU that `hardware` names."""

    hardware: str
    sms: int
    """Streaming multiprocessors."""
    start: float
    """A kernel, and a task without pages; the coding of rows."""
    further: float
    """Another kernel, which starts beside the first."""
    page_alone: float
    """One more page of the longest task."""
    row_alone: float
    """The same for each row of its tile."""
    many_alone: float
    """What the first page of a task takes longer where programs are many, of a warp each."""
    second_page: float
    """Waiting for the second page of a task where programs are few: the first is there when the
    kernel before ends."""
    page: float
    """One more page, when all of the GPU is busy: bytes over bandwidth."""
    reread: float
    """Reading a page once more, soon after."""
    row_page: float
    """One more row of a tile that reads a page, when all of the GPU is busy."""
    opened: float
    """One open page."""
    opened_beside: float
    """The same besides, where programs are few and ask for later pages at the same moment."""
    partial: float
    """Writing and reading one partial result."""
    merge: float
    """A row that has partials."""
    merge_step: float
    """One more partial of the row that has most."""
    coding: float
    """Another kernel that codes rows."""

    def seconds(self, work: Work, head_width: int) -> Floats:
        """Predicted seconds of plans."""
        coefficients = self._coefficients()
        return np.maximum(
            *(
                _seconds(_features(view, head_width), np.asarray(view.full), coefficients)
                for view in _views(work)
            )
        )

    def _coefficients(self) -> Floats:
        return np.array([getattr(self, name) for name in _COEFFICIENTS])


_COEFFICIENTS = tuple(
    f.name for f in dataclasses.fields(DecodeCost) if f.type != "str" and f.type != "int"
)
_OF_A_TASK = ("page_alone", "row_alone", "many_alone")
_ALONE = np.array([name in _OF_A_TASK for name in _COEFFICIENTS])
_OF_KERNELS = ("start", "further", "second_page", "merge", "merge_step", "coding")
_REST = np.array([name in _OF_KERNELS for name in _COEFFICIENTS])
_TOGETHER = ~_ALONE & ~_REST
_PER_BYTE = _TOGETHER | np.array([name == "merge_step" for name in _COEFFICIENTS])
_NO_COLUMNS = ("full", "longest_of_all", "longest_rows_of_all")


def _views(work: Work) -> tuple[Work, Work]:
    """Tasks in waves, and all of them as one wave."""
    longest, rows = work.longest_of_all, work.longest_rows_of_all
    return work, work._replace(full=0.0 * work.full, longest=longest, longest_rows=rows)


def _features(work: Work, head_width: int) -> Floats:
    """[K, F], what each coefficient is multiplied with."""
    numbers = [value for name, value in work._asdict().items() if name not in _NO_COLUMNS]
    columns = np.stack(np.broadcast_arrays(*numbers), -1).astype(np.float64)
    columns[..., _PER_BYTE] *= head_width / _HEAD_WIDTH
    return columns


def _parts(features: Floats, coefficients: Floats) -> tuple[Floats, Floats, Floats]:
    alone, together, rest = (
        features @ np.where(part, coefficients, 0.0) for part in (_ALONE, _TOGETHER, _REST)
    )
    return alone, together, rest


def _seconds(features: Floats, full: Floats, coefficients: Floats) -> Floats:
    alone, together, rest = _parts(features, coefficients)
    return np.asarray(rest + together * full + _either(alone, together * (1 - full)))


def _either(alone: Floats, together: Floats) -> Floats:
    total = alone**_SHARPNESS + together**_SHARPNESS
    return np.asarray(total ** (1 / _SHARPNESS))


class Measurement(NamedTuple):
    """One plan, timed."""

    work: Work
    head_width: int
    seconds: float


def fit(
    measurements: Sequence[Measurement], hardware: str, sms: int, bandwidth: float
) -> DecodeCost:
    """Least squares of relative errors, of coefficients that can be.

    None is negative. A page costs at least its bytes over the `bandwidth` of the memory, bytes per
    second, and reading it again a part of that: of times that do not tell them from what else grows
    with pages, least squares would give either all of it, and without a price of reading again no
    plan would share pages.

    The model is linear but for the sum of squares, of which each side counts by how much of it it
    is, and for the view of waves that counts; those and the coefficients are found in turns.
    """
    page = _PAGE_BYTES / bandwidth
    least = np.zeros(len(_COEFFICIENTS))
    least[_COEFFICIENTS.index("page")] = page
    least[_COEFFICIENTS.index("reread")] = page / _CACHE_GAIN
    views = [[_views(m.work)[i] for m in measurements] for i in (0, 1)]
    widths = [m.head_width for m in measurements]
    features_of = [np.stack([_features(*p) for p in zip(v, widths, strict=True)]) for v in views]
    full_of = [np.array([float(work.full) for work in view]) for view in views]
    seconds = np.array([m.seconds for m in measurements])
    weight_alone = weight_together = np.full(len(seconds), 0.5)
    as_one = np.zeros(len(seconds), bool)
    best: tuple[float, Floats] | None = None
    for _ in range(_TURNS):
        features = np.where(as_one[:, None], features_of[1], features_of[0])
        full = np.where(as_one, full_of[1], full_of[0])
        weighted = features.copy()
        weighted[:, _ALONE] *= weight_alone[:, None]
        weighted[:, _TOGETHER] *= weight_together[:, None]
        coefficients = _solve(weighted / seconds[:, None], least)
        in_waves, at_once = (
            _seconds(f, part, coefficients) for f, part in zip(features_of, full_of, strict=True)
        )
        error = float(np.square(np.maximum(in_waves, at_once) / seconds - 1.0).mean())
        if best is None or error < best[0]:
            best = (error, coefficients)
        alone, together, _ = _parts(features, coefficients)
        last = together * (1 - full)
        either = np.maximum(_either(alone, last), 1e-12)
        # Half way only, for the weights would swing otherwise.
        weight_alone = (weight_alone + (alone / either) ** (_SHARPNESS - 1)) / 2
        part = full + (1 - full) * (last / either) ** (_SHARPNESS - 1)
        weight_together = (weight_together + part) / 2
        as_one = at_once > in_waves
    assert best is not None
    return DecodeCost(
        hardware=hardware, sms=sms, **dict(zip(_COEFFICIENTS, map(float, best[1]), strict=True))
    )


def _solve(matrix: Floats, least: Floats) -> Floats:
    """The x, nowhere below `least`, that makes `matrix @ x` nearest to ones: coordinate descent on
    the normal equations."""
    scale = np.maximum(np.sqrt(np.square(matrix).sum(0)), 1e-300)
    scaled = matrix / scale
    gram, target = scaled.T @ scaled, scaled.sum(0)
    bound = least * scale
    solution = bound.copy()
    for _ in range(500):
        for i in range(len(solution)):
            if gram[i, i] > 0:
                step = (target[i] - gram[i] @ solution) / gram[i, i]
                solution[i] = max(bound[i], solution[i] + step)
    return np.asarray(solution / scale)

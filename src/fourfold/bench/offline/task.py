"""What crosses between the run and an engine's process: the question and the answer."""

from __future__ import annotations

import random

import msgspec

from fourfold.bench.offline.cases import Case
from fourfold.bench.record import Result
from fourfold.models.precision import PageFormat, Precision

_IDS = (10, 30_000)
"""Token ids drawn from, as far as the vocabulary goes."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine is asked. `started` is the `time.time()` at which its process was; `profiles`
    a folder for tables of what the GPU did."""

    engine: str
    started: float
    model: str | None
    vocabulary: int
    precision: Precision
    kv_pages: PageFormat
    dummy: bool
    uniform_routing: bool
    cases: tuple[Case, ...]
    max_running: int | None
    step_tokens: int | None
    mixed_tokens: int | None
    kv_memory_gib: float | None
    profiles: str | None

    def draw_prompts(self, seed: str, count: int, tokens: int) -> list[list[int]]:
        """Random token ids, different from the first on, so that no prefix cache helps."""
        numbers = random.Random(seed)
        low, high = _IDS
        ids = range(low, min(self.vocabulary, high))
        return [numbers.choices(ids, k=tokens) for _ in range(count)]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine gave."""

    version: str
    results: list[Result]

"""The device side of an engine: turns a step plan into tokens.

Holds the model, the KV pages and the per-sample state that lives on the device. `launch` only
enqueues work; the answer is read when `Launched.results` is called, which is where the host waits.

Shapes: T rows of a step, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import SamplingParams, TokenLogprob
from fourfold.engine.sampler import (
    SampledRow,
    TokenCounts,
    logprobs,
    penalises,
    sample,
    uniform,
)
from fourfold.engine.scheduler import Sampled, StepPlan, Work
from fourfold.errors import ConfigError
from fourfold.models.decoder import Decoder
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages, PageShape
from fourfold.quadrants.step import QuadrantStep, Span

_CPU_KV_GIB = 2.0
_GPU_FREE_SHARE = 0.9
# Logits of a whole prompt are made this many rows at a time, to bound their memory.
_PROMPT_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step under way. `results` waits for the device and answers each work of the plan."""

    results: Callable[[], list[Sampled]]


class Runner:
    """One model on one device. Used by the engine's thread alone."""

    def __init__(self, model: Decoder, config: EngineConfig, kv_dtype: torch.dtype) -> None:
        self.model = model
        self.device = model.frequencies.device
        shape = PageShape(
            layers=model.config.layers,
            kv_heads=model.config.kv_heads,
            head_width=model.config.head_width,
            dtype=kv_dtype,
        )
        page_bytes = shape.page_bytes
        size = self._kv_bytes(config)
        if size < 2 * page_bytes:
            raise ConfigError(
                f"{size // page_bytes:.0f} KV pages of {page_bytes / 2**20:.1f} MiB fit; "
                "raise --kv-memory-gib"
            )
        try:
            count = int(size // page_bytes)
            self.pages = KVPages(shape, count, self.device)
        except (MemoryError, OverflowError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{size / 2**30:g} GiB of KV pages cannot be allocated on {self.device}; "
                "lower --kv-memory-gib"
            ) from error
        if self.device.type == "cpu":
            _keep_freed_memory()
        self.page_count = count
        self._cores = torch.get_num_threads()
        self._decode_threads = config.decode_threads or self._cores
        self._last_token = torch.zeros(config.max_running, dtype=torch.int64, device=self.device)
        self._counts = TokenCounts(config.max_running, model.config.vocabulary, self.device)
        self._counted: dict[int, tuple[int, int]] = {}

    @property
    def max_context(self) -> int:
        """Tokens one sample can hold: what the model knows and the pages can keep."""
        return min(self.model.config.max_positions, self.page_count * PAGE_TOKENS)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Enqueues one step."""
        if self.device.type == "cpu":
            torch.set_num_threads(self._cores if plan.prefills else self._decode_threads)
        step = QuadrantStep(
            self.pages,
            [_span(work) for work in plan.decodes],
            [_span(work) for work in plan.prefills],
        )
        hidden_TD = self.model(self._input_tokens(plan), step.positions_T, step)
        sampling = [work for work in plan.work if work.samples]
        row_answers = self._sample(hidden_TD, plan, sampling) if sampling else None
        prompt_answers = self._prompt_logprobs(hidden_TD, plan)

        def results() -> list[Sampled]:
            tokens = iter(row_answers() if row_answers else ())
            return [
                dataclasses.replace(
                    next(tokens) if work.samples else Sampled(),
                    prompt_logprobs=prompt_answers.get(row, tuple)(),
                )
                for row, work in enumerate(plan.work)
            ]

        return Launched(results)

    def _kv_bytes(self, config: EngineConfig) -> float:
        if config.kv_memory_gib is not None:
            return config.kv_memory_gib * 2**30
        if self.device.type == "cpu":
            return _CPU_KV_GIB * 2**30
        free, _ = torch.cuda.mem_get_info(self.device)
        return free * _GPU_FREE_SHARE

    def _input_tokens(self, plan: StepPlan) -> Tensor:
        """The rows' token ids; those the host has not seen yet come from the device."""
        known = [
            token
            for work in plan.work
            for token in work.sequence.tokens[work.start : work.start + work.length] or (0,)
        ]
        tokens_T = torch.tensor(known).to(self.device, non_blocking=True)
        unseen = [
            (row, work.sequence.slot)
            for row, work in enumerate(plan.decodes)
            if work.start >= len(work.sequence.tokens)
        ]
        if unseen:
            rows, slots = torch.tensor(unseen, device=self.device).unbind(-1)
            tokens_T[rows] = self._last_token[slots]
        return tokens_T

    def _sample(
        self, hidden_TD: Tensor, plan: StepPlan, sampling: list[Work]
    ) -> Callable[[], list[Sampled]]:
        logits_SV = self.model.logits(hidden_TD[_last_rows(plan, self.device)])
        rows = [self._row(work) for work in sampling]
        tokens_S = sample(logits_SV, rows, self._counts)
        slots_S = torch.tensor([row.slot for row in rows], device=self.device)
        self._last_token[slots_S] = tokens_S
        counted = [place for place, row in enumerate(rows) if penalises(row.params)]
        if counted:
            places = torch.tensor(counted, device=self.device)
            self._counts.add(slots_S[places], tokens_S[places])
        wanted = [row.params.logprobs for row in rows]
        if all(count is None for count in wanted):
            return lambda: [Sampled(token=token) for token in tokens_S.tolist()]
        read = _read_logprobs(logits_SV, tokens_S, max(count or 0 for count in wanted))

        def answers() -> list[Sampled]:
            return [
                Sampled(
                    token=entry.token,
                    logprob=None if count is None else _cut(entry, count),
                )
                for entry, count in zip(read(), wanted, strict=True)
            ]

        return answers

    def _row(self, work: Work) -> SampledRow:
        sequence = work.sequence
        params: SamplingParams = sequence.request.sampling
        stay = (sequence.arrival, sequence.admissions)
        if penalises(params) and self._counted.get(sequence.slot) != stay:
            self._counted[sequence.slot] = stay
            output = sequence.tokens[sequence.prompt_length :]
            self._counts.start(sequence.slot, sequence.request.prompt_ids, output)
        seed = sequence.request.request_id if params.seed is None else params.seed
        return SampledRow(params, uniform(seed, sequence.index, sequence.length), sequence.slot)

    def _prompt_logprobs(
        self, hidden_TD: Tensor, plan: StepPlan
    ) -> dict[int, Callable[[], tuple[TokenLogprob, ...]]]:
        """For each work of a prompt that wants them: log-probabilities of the tokens after its
        rows, as far as they are the prompt's."""
        answers: dict[int, Callable[[], tuple[TokenLogprob, ...]]] = {}
        start = 0
        for row, work in enumerate(plan.work):
            sequence = work.sequence
            known = min(work.length, sequence.prompt_length - 1 - work.start)
            if sequence.wants_prompt_logprobs and known > 0:
                alternatives = sequence.request.sampling.logprobs or 0
                reads = []
                for first in range(0, known, _PROMPT_ROWS):
                    rows = min(_PROMPT_ROWS, known - first)
                    hidden = hidden_TD[start + first : start + first + rows]
                    after = work.start + first + 1
                    targets = torch.tensor(
                        sequence.tokens[after : after + rows], device=self.device
                    )
                    reads.append(_read_logprobs(self.model.logits(hidden), targets, alternatives))
                answers[row] = functools.partial(_concatenate, reads)
            start += work.length
        return answers


def _span(work: Work) -> Span:
    return Span(work.start, work.length, work.sequence.pages)


def _last_rows(plan: StepPlan, device: torch.device) -> Tensor:
    rows, end = [], 0
    for work in plan.work:
        end += work.length
        if work.samples:
            rows.append(end - 1)
    return torch.tensor(rows, device=device)


def _read_logprobs(
    logits_SV: Tensor, tokens_S: Tensor, alternatives: int
) -> Callable[[], list[TokenLogprob]]:
    chosen_S, top = logprobs(logits_SV, tokens_S, alternatives)

    def read() -> list[TokenLogprob]:
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, (ids, values) in zip(
                tokens_S.tolist(), chosen_S.tolist(), likeliest, strict=True
            )
        ]

    return read


def _concatenate(reads: list[Callable[[], list[TokenLogprob]]]) -> tuple[TokenLogprob, ...]:
    return tuple(entry for read in reads for entry in read())


def _cut(entry: TokenLogprob, count: int) -> TokenLogprob:
    return TokenLogprob(entry.token, entry.logprob, entry.top[:count])


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    Every step frees and allocates activations of megabytes; getting them back as fresh pages costs
    more than the arithmetic on them (measured, see docs/experiments.md). Elsewhere: nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)

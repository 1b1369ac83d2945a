"""Logits to tokens.

Only what some row of the batch asks for is computed: greedy rows cost one argmax. A drawn token is
the inverse of the cumulative distribution at one uniform number, which is a hash of the request's
seed, the sample and the position, so a result does not depend on the rest of the batch.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fourfold.engine.messages import SamplingParams

_MASK = (1 << 64) - 1
# Top-p looks at this many likeliest tokens first; only a flatter distribution sorts them all.
_NUCLEUS = 1024
# Colder than this means the argmax; dividing by it could overflow.
_COLDEST = 1e-4


@dataclasses.dataclass(frozen=True)
class SampledRow:
    """What one row draws: its parameters, its uniform number in [0, 1), and the per-sample state
    slot that counts its tokens."""

    params: SamplingParams
    uniform: float
    slot: int


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from three integers (splitmix64 finaliser over their combination)."""
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + position + 1) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


class TokenCounts:
    """How often each token stands in prompt and output of the samples that penalise repetition.

    Two int32 tensors [slots, V], made when first needed.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._shape = (slots, vocabulary)
        self._device = device
        self._output: Tensor | None = None
        self._seen: Tensor | None = None

    def start(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Begins counting for a slot: at admission, and again after preemption."""
        seen, counts = self._tensors()
        seen[slot].zero_()
        counts[slot].zero_()
        for tensor, tokens in ((seen, [*prompt, *output]), (counts, output)):
            ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
            tensor[slot].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """Counts one newly drawn token of each slot."""
        seen, counts = self._tensors()
        seen[slots, tokens] += 1
        counts[slots, tokens] += 1

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(in prompt or output, in output) for these slots; int32 [len, V] each."""
        seen, counts = self._tensors()
        return seen[slots], counts[slots]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._output is None:
            self._seen = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._output = torch.zeros_like(self._seen)
        return self._seen, self._output


def penalises(params: SamplingParams) -> bool:
    """Whether a sample's token counts are needed."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def sample(logits_SV: Tensor, rows: Sequence[SampledRow], counts: TokenCounts) -> Tensor:
    """The next token of each row, int64 [S]. `logits_SV` float32 is left as it is."""
    adjusted_SV = _adjust(logits_SV, rows, counts)
    greedy = [row.params.temperature < _COLDEST for row in rows]
    if all(greedy):
        return adjusted_SV.argmax(-1)
    device = logits_SV.device
    greedy_S = torch.tensor(greedy, device=device)
    temperature_S = _column([max(row.params.temperature, _COLDEST) for row in rows], device)
    scaled_SV = _filter(adjusted_SV / temperature_S, [row.params for row in rows])
    cumulative_SV = scaled_SV.softmax(-1).cumsum(-1)
    uniform_S = _column([row.uniform for row in rows], device)
    target_S1 = uniform_S * cumulative_SV[:, -1:]
    drawn_S = torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(-1)
    # Rounding can lift the target to the total itself; any token may stand for that sliver.
    beyond = drawn_S >= logits_SV.shape[-1]
    drawn_S = torch.where(beyond, scaled_SV.argmax(-1), drawn_S)
    return torch.where(greedy_S, adjusted_SV.argmax(-1), drawn_S)


def logprobs(logits_SV: Tensor, tokens_S: Tensor, alternatives: int) -> tuple[Tensor, Any]:
    """Log-probabilities of `tokens_S` [S] under softmax(logits), and the `alternatives` likeliest
    as torch.topk returns them ([S, alternatives] values and indices)."""
    scores_SV = logits_SV.log_softmax(-1)
    chosen_S = scores_SV.gather(-1, tokens_S[:, None]).squeeze(-1)
    return chosen_S, scores_SV.topk(alternatives, dim=-1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _adjust(logits_SV: Tensor, rows: Sequence[SampledRow], counts: TokenCounts) -> Tensor:
    device = logits_SV.device
    penalised = [i for i, row in enumerate(rows) if penalises(row.params)]
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    if not penalised and not biased:
        return logits_SV
    logits_SV = logits_SV.clone()
    if penalised:
        params = [rows[i].params for i in penalised]
        index = torch.tensor(penalised, device=device)
        slots = torch.tensor([rows[i].slot for i in penalised], device=device)
        seen, output = counts.of(slots)
        repetition = _column([p.repetition_penalty for p in params], device)
        chosen = logits_SV[index]
        repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(seen > 0, repeated, chosen)
        chosen -= output * _column([p.frequency_penalty for p in params], device)
        chosen -= (output > 0) * _column([p.presence_penalty for p in params], device)
        logits_SV[index] = chosen
    for i in biased:
        bias = rows[i].params.logit_bias
        ids = torch.tensor(list(bias), device=device)
        logits_SV[i, ids] += torch.tensor(list(bias.values()), device=device)
    return logits_SV


def _filter(scaled_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf for every token that top-k, then top-p, then min-p excludes."""
    device, vocabulary = scaled_SV.device, scaled_SV.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    if min(top_k) < vocabulary:
        limit = max(k for k in top_k if k < vocabulary)
        likeliest = scaled_SV.topk(limit, dim=-1).values
        last = torch.tensor([min(k, limit) - 1 for k in top_k], device=device)[:, None]
        everything = torch.tensor([k == vocabulary for k in top_k], device=device)[:, None]
        threshold = likeliest.gather(-1, last).masked_fill(everything, -torch.inf)
        scaled_SV = scaled_SV.masked_fill(scaled_SV < threshold, -torch.inf)
    if any(p.top_p < 1 for p in params):
        threshold = _nucleus_threshold(scaled_SV, _column([p.top_p for p in params], device))
        scaled_SV = scaled_SV.masked_fill(scaled_SV < threshold, -torch.inf)
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], device).log()
        threshold = scaled_SV.amax(-1, keepdim=True) + floor
        scaled_SV = scaled_SV.masked_fill(scaled_SV < threshold, -torch.inf)
    return scaled_SV


def _nucleus_threshold(scaled_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """The logit of the last token of the smallest set whose mass reaches top-p; [S, 1]."""
    total_S1 = scaled_SV.logsumexp(-1, keepdim=True)
    width = min(_NUCLEUS, scaled_SV.shape[-1])
    while True:
        likeliest = scaled_SV.topk(width, dim=-1).values
        mass = (likeliest - total_S1).exp().cumsum(-1)
        inside = (mass < top_p_S1) & (top_p_S1 < 1)
        if width == scaled_SV.shape[-1] or not bool(inside[:, -1].any()):
            break
        width = scaled_SV.shape[-1]
    last = inside.sum(-1, keepdim=True).clamp_max(width - 1)
    threshold = likeliest.gather(-1, last)
    return threshold.masked_fill(top_p_S1 >= 1, -torch.inf)

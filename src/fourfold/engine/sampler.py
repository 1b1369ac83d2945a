"""What the messages of requests say about sampling, as `kernels.sample` takes it.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fourfold.engine.messages import SamplingParams
from fourfold.kernels.sample import SampleRow, TokenTables, noise_key


class TokenCounts:
    """`TokenTables` of the samples that run, made when the first of them needs any."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._shape = (slots, vocabulary)
        self._device = device
        self.tables: TokenTables | None = None

    def start(
        self,
        slot: int,
        prompt: Sequence[int],
        output: Sequence[int],
        bias: Mapping[int, float],
    ) -> None:
        """Begins a sample in a slot: at admission, and again after preemption."""
        if self.tables is None:
            self.tables = TokenTables(*self._shape, self._device)
        self.tables.start(slot, prompt, output, bias)


def penalises(params: SamplingParams) -> bool:
    """Whether a sample's token counts are needed."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def sample_row(
    params: SamplingParams, seed: int, index: int, position: int, slot: int
) -> SampleRow:
    """The row that draws a sample's token at `position`.

    Args:
        seed: keys the noise together with the sample's `index` and the position.
        slot: of the sample in the tables.
    """
    return SampleRow(
        key=noise_key(seed, index),
        position=position,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        slot=slot,
        adjusted=penalises(params) or bool(params.logit_bias),
        biased=bool(params.logit_bias),
        logprob=params.logprobs is not None,
    )


def likeliest(logits_SV: Tensor, alternatives: int) -> Any:
    """The likeliest tokens under softmax(logits) with their log-probabilities, as torch.topk
    returns them ([S, alternatives] values and indices)."""
    return logits_SV.float().log_softmax(-1).topk(alternatives, dim=-1)


def logprobs(logits_SV: Tensor, tokens_S: Tensor, alternatives: int) -> tuple[Tensor, Any]:
    """Log-probabilities of `tokens_S` [S] under softmax(logits), and the `likeliest`."""
    scores_SV = logits_SV.float().log_softmax(-1)
    chosen_S = scores_SV.gather(-1, tokens_S[:, None]).squeeze(-1)
    return chosen_S, scores_SV.topk(alternatives, dim=-1)

"""What requests say about sampling, as `kernels.sample` takes it; what is kept of their samples.

Shapes: S sampled rows, F words of a row's record, V vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourfold.engine.messages import SamplingParams
from fourfold.engine.sequence import Sequence as Sample
from fourfold.kernels.sample import SampleRow, TokenTables, noise_key
from fourfold.kernels.sample.params import POSITION_WORD, pack_rows
from fourfold.kernels.staging import Ints


class Adjustment(enum.Enum):
    """Which tables sampling reads."""

    NONE = 0
    PENALTIES = 1
    BIASES = 2


class Samples:
    """What is kept of the samples that run, a row for each slot: how they are sampled on the host,
    their last tokens and their `TokenTables` on the device. One row more is for padding."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.padding = slots
        """The row that nobody reads."""
        self.last_token = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.tables: TokenTables | None = None
        """Made when the first sample needs any."""
        self._vocabulary = vocabulary
        idle = SampleRow(key=0, position=0, temperature=0.0, slot=slots, logprob=False)
        self._records = np.repeat(pack_rows([idle]), slots + 1, axis=0)
        self._adjusted = np.zeros(slots + 1, dtype=bool)
        self._stays: dict[int, tuple[int, int]] = {}

    def params(self, sequences: Sequence[Sample]) -> tuple[Ints, Adjustment]:
        """The rows that draw each sample's next token, packed [S, F], and what any of them needs
        of the tables."""
        slots_S = np.array([sequence.slot for sequence in sequences], np.int64)
        for sequence in sequences:
            stay = (sequence.arrival, sequence.admissions)
            if self._stays.get(sequence.slot) != stay:
                self._stays[sequence.slot] = stay
                self._begin(sequence)
        packed_SF = self._records[slots_S]
        packed_SF[:, POSITION_WORD] = [sequence.length for sequence in sequences]
        if not self._adjusted[slots_S].any():
            return packed_SF, Adjustment.NONE
        biased = self.need_tables().bias_NV is not None
        return packed_SF, Adjustment.BIASES if biased else Adjustment.PENALTIES

    def restart(self) -> None:
        """Has every sample begin anew in its slot, from the tokens that the host knows by then."""
        self._stays.clear()

    def padded(self, packed_SF: Ints, rows: int) -> Ints:
        """Packed rows, and as many of padding as make `rows`."""
        return np.concatenate((packed_SF, self._records[[self.padding] * (rows - len(packed_SF))]))

    def need_tables(self) -> TokenTables:
        """The tables, which are made now if there are none."""
        if self.tables is None:
            self.tables = TokenTables(self.padding + 1, self._vocabulary, self.last_token.device)
        return self.tables

    def _begin(self, sequence: Sample) -> None:
        """A sample came to its slot: for the first time, or again after preemption."""
        request = sequence.request
        params = request.sampling
        seed = request.request_id if params.seed is None else params.seed
        row = sample_row(params, seed, sequence.index, sequence.length, sequence.slot)
        self._records[sequence.slot] = pack_rows([row])
        self._adjusted[sequence.slot] = row.adjusted
        if row.adjusted:
            output = sequence.tokens[sequence.prompt_length :]
            self.need_tables().start(sequence.slot, request.prompt_ids, output, params.logit_bias)


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

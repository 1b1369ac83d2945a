"""One forward pass and the sampling after it: what a step is on the device.

Shapes: T rows of a step, S sampled rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fourfold.engine.sampler import Adjustment, Samples
from fourfold.kernels.sample import SampleParams, newest_tokens, sample
from fourfold.kernels.sample.params import WORDS
from fourfold.kernels.staging import Staging
from fourfold.models.decoder import Decoder
from fourfold.quadrants.step import QuadrantStep


class StepOutputs(NamedTuple):
    """What a step leaves on the device; rows of padding hold anything."""

    hidden_TD: Tensor | None
    logits_SV: Tensor | None
    """These two: None where nobody reads them."""
    tokens_S: Tensor
    """int64."""
    logprobs_S: Tensor
    """float32, of the rows that want them."""


def input_sizes(rows: int, sampled: int) -> dict[str, int]:
    """Words of the arrays that `run_step` reads."""
    return {
        "number": 1,
        "tokens": rows,
        "sources": rows,
        "sampled": sampled,
        "params": sampled * WORDS,
    }


def run_step(
    model: Decoder,
    step: QuadrantStep,
    inputs: Staging,
    samples: Samples,
    *,
    adjustment: Adjustment,
) -> StepOutputs:
    """Enqueues a step.

    Args:
        model: what to run.
        step: its rows.
        inputs: int32: `tokens` [T], `sources` [T] (where not negative, the slot whose last token is
            taken instead), `sampled` [S] (the rows whose next token is drawn) and `params` (of S
            rows, packed). `number` [1], the step's, is read by its marks alone.
        samples: read and updated.
        adjustment: the tables that rows need.
    """
    tokens_T = newest_tokens(inputs["tokens"], inputs["sources"], samples.last_token)
    hidden_TD = model(tokens_T, step.positions_T, step)
    if not len(inputs["sampled"]):
        nothing = hidden_TD.new_empty(0)
        return StepOutputs(hidden_TD, None, nothing.long(), nothing.float())
    logits_SV = model.logits(hidden_TD.index_select(0, inputs["sampled"]))
    params = SampleParams(inputs["params"].view(-1, WORDS))
    tables = samples.need_tables() if adjustment is not Adjustment.NONE else None
    drawn = sample(logits_SV, params, tables, last_N=samples.last_token)
    if tables is not None:
        # Of every row: counts of samples that penalise nothing are read by nobody.
        tables.add(params.slot.long(), drawn.tokens_S)
    return StepOutputs(hidden_TD, logits_SV, drawn.tokens_S, drawn.logprobs_S)

"""The verb: from logits to tokens, on whatever device they are.

A drawn token is the inverse of the cumulative distribution, in the order of the vocabulary, at one
number in [0, 1). That needs no noise for each token, as adding Gumbel noise would, and no sorted
vocabulary: every filter keeps the tokens within some distance of the likeliest, so only that
distance has to be found.

Shapes: S rows, V vocabulary, N slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.sample import reference
from fourfold.kernels.sample.choose import choose
from fourfold.kernels.sample.params import WORDS, SampleParams
from fourfold.kernels.sample.tables import TokenTables


class Sampled(NamedTuple):
    """What was drawn."""

    tokens_S: Tensor
    """int64."""
    logprobs_S: Tensor
    """float32: of the drawn tokens under softmax(logits), before any adjustment and filter; of rows
    that want it."""


def sample(
    logits_SV: Tensor,
    params: SampleParams,
    tables: TokenTables | None = None,
    *,
    last_N: Tensor | None = None,
) -> Sampled:
    """Draws the next token of each row.

    Rows marked as adjusted have penalties applied to their logits: repetition (divides positive,
    multiplies negative logits of tokens in prompt or output), frequency (subtracted for each time
    the output holds the token), presence (subtracted once), then biases. A temperature below 1e-4
    takes the likeliest token, the first of equals. Otherwise, with `below` a token's distance from
    the largest logit in float32 and exp(-below / temperature) its weight, a token is kept by

    - top-k, if it is no further below than the k-th likeliest (equals of the k-th are all kept);
    - top-p, if it is no further below than the last token of the smallest set of the likeliest
      that holds this share of the weight that top-k left (again with its equals);
    - min-p, if its weight is at least this share of the largest weight;

    and one of those kept is drawn in proportion to their weights. A row's result does not depend
    on the other rows and is the same in every run. Never waits for the device.

    Args:
        logits_SV: float32, bfloat16 or float16 [S, V], rows contiguous; left as they are.
        params: of the S rows, on the device of the logits.
        tables: tallies and biases of all slots; may be None where no row is adjusted.
        last_N: the last tokens of all slots, int64; those of the rows' slots become what is drawn.
    """
    rows, vocabulary = logits_SV.shape
    assert params.packed_SF.shape == (rows, WORDS), (params.packed_SF.shape, rows)
    assert params.packed_SF.device == logits_SV.device, params.packed_SF.device
    assert tables is None or tables.tally_NV.shape[1] == vocabulary, vocabulary
    if logits_SV.device.type == "cpu":
        tokens_S = reference.sample(logits_SV, params, tables)
        if last_N is not None:
            last_N[params.slot] = tokens_S
        return Sampled(tokens_S, reference.logprobs(logits_SV, params, tokens_S))
    from fourfold.kernels.sample import triton_sample

    assert logits_SV.stride(1) == 1, logits_SV.stride()
    assert params.packed_SF.is_contiguous(), params.packed_SF.stride()
    tokens_S = logits_SV.new_empty(rows, dtype=torch.int64)
    logprobs_S = logits_SV.new_empty(rows, dtype=torch.float32)
    cut = choose(vocabulary)
    triton_sample.launch(logits_SV, params.packed_SF, tables, cut, tokens_S, logprobs_S, last_N)
    return Sampled(tokens_S, logprobs_S)

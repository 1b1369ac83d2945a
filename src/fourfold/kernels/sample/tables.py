"""What a batch's samples have said so far, for penalties, and the biases they asked for.

Dense tables, one row a slot, and a bitmap of the few tokens in them that matter: a kernel reads the
bitmap (1/32 word a token) and of the tables only where it is set, so that penalties cost next to
nothing beside reading the logits.

Shapes: N slots, V vocabulary, W = ceil(V / 32) words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def seen(tally: Tensor) -> Tensor:
    """Whether prompt or output holds the tokens; bool, as a `tally` of them."""
    return tally.view(torch.int32) != 0


class TokenTables:
    """Tallies, biases and the bitmap of N slots on one device.

    `tally_NV` float32: how often the output holds a token, with a minus sign if the prompt holds it
    too, hence -0.0 for one of the prompt alone and no bit set for one in neither. `bias_NV`
    float32 is made when a sample first has biases. `touched_NW` int32: bit j of word w is set where
    token 32 w + j has a tally or a bias.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        words = -(-vocabulary // 32)
        self.tally_NV = torch.zeros((slots, vocabulary), device=device)
        self.touched_NW = torch.zeros((slots, words), dtype=torch.int32, device=device)
        self.bias_NV: Tensor | None = None
        self._weights_32 = 1 << torch.arange(32, device=device)

    def start(
        self, slot: int, prompt: Sequence[int], output: Sequence[int], bias: Mapping[int, float]
    ) -> None:
        """Begins a sample in a slot: at admission, and again after preemption."""
        tally_V = self.tally_NV[slot].zero_()
        output_ids = self._ids(output)
        tally_V.index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.float32))
        prompt_ids = self._ids(prompt)
        tally_V[prompt_ids] = tally_V[prompt_ids].abs().neg()
        touched_V = seen(tally_V)
        if bias and self.bias_NV is None:
            self.bias_NV = torch.zeros_like(self.tally_NV)
        if self.bias_NV is not None:
            bias_V = self.bias_NV[slot].zero_()
            values = torch.tensor(list(bias.values()), dtype=torch.float32)
            bias_V[self._ids(list(bias))] = values.to(bias_V.device)
            touched_V |= bias_V != 0
        bits_V = touched_V.new_zeros(self.touched_NW.shape[1] * 32)
        bits_V[: touched_V.shape[0]] = touched_V
        words_W = (bits_V.view(-1, 32) * self._weights_32).sum(-1)
        self.touched_NW[slot] = torch.where(words_W >> 31 != 0, words_W - (1 << 32), words_W).int()

    def add(self, slots_S: Tensor, tokens_S: Tensor) -> None:
        """Counts one newly drawn token of each slot; int64 [S] both, no slot twice."""
        tally_S = self.tally_NV[slots_S, tokens_S]
        self.tally_NV[slots_S, tokens_S] = tally_S + tally_S.new_ones(()).copysign(tally_S)
        bit_S = self._weights_32[tokens_S % 32].to(torch.int32)
        self.touched_NW[slots_S, tokens_S // 32] |= bit_S

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64).to(self.tally_NV.device)

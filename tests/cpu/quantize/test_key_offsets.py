"""Leaving out what all keys have in common: scores move together, codes become finer."""

from __future__ import annotations

import torch

from fourfold.quantize.key_offsets import KeyMean

T, G, C = 64, 2, 16


def keys() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    biased = torch.zeros(G, C)
    biased[0, 3], biased[1, 9] = 20.0, -30.0
    return torch.randn(T, G, C, generator=generator) + biased


def test_the_mean_does_not_depend_on_how_the_text_is_cut() -> None:
    k_TGC = keys()
    whole, pieces = KeyMean(), KeyMean()
    whole.add(k_TGC)
    for piece in k_TGC.bfloat16().split(7):
        pieces.add(piece)
    torch.testing.assert_close(whole.mean(), k_TGC.mean(0))
    torch.testing.assert_close(pieces.mean(), whole.mean(), atol=0.05, rtol=0)


def test_attention_stays_and_scales_shrink() -> None:
    k_TGC, q_TGC = keys(), torch.randn(T, G, C, generator=torch.Generator().manual_seed(2))
    mean = KeyMean()
    mean.add(k_TGC)
    left_TGC = k_TGC - mean.mean()

    def weights(k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tgc,sgc->gts", q_TGC, k).softmax(-1)

    torch.testing.assert_close(weights(left_TGC), weights(k_TGC), rtol=1e-4, atol=1e-6)
    assert float(left_TGC.abs().max()) < 0.3 * float(k_TGC.abs().max())

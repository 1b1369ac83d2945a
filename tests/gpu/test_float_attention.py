"""Attention over float pages on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from fourfold.quadrants.kv_pages import PAGE_TOKENS, FloatPages, PageShape, Span
from fourfold.quadrants.prefill_attention import FloatPrefillAttention

GPU = torch.device("cuda:0")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("prefix", [0, 70, 293])
def test_chunks_of_every_length(dtype: torch.dtype, heads: int, kv_heads: int, prefix: int) -> None:
    """A row that is left alone after whole blocks of rows, too: kernels treat that one apart."""
    generator = torch.Generator(GPU).manual_seed(prefix)
    for rows in (1, 2, 31, 32, 33, 63, 64, 65, 66, 96, 97, 128, 129, 193, 257):
        shape = PageShape(layers=1, kv_heads=kv_heads, head_width=16, dtype=dtype)
        count = -(-(prefix + rows) // PAGE_TOKENS)
        pages = FloatPages(shape, count, GPU)
        ids = torch.randperm(count).tolist()

        def draw(tokens: int, of: int) -> torch.Tensor:
            return torch.randn(tokens, of, 16, generator=generator, device=GPU, dtype=dtype)

        k_SGC, v_SGC = draw(prefix + rows, kv_heads), draw(prefix + rows, kv_heads)
        pages.writes([Span(0, prefix + rows, ids)]).before_attention(0, k_SGC, v_SGC)
        q_THC = draw(rows, heads)
        attention = FloatPrefillAttention([Span(prefix, rows, ids)], pages)
        out_THC = attention(0, q_THC, k_SGC[prefix:], v_SGC[prefix:])
        expected_THC = _exact(q_THC, k_SGC, v_SGC)
        error_T = (out_THC - expected_THC).abs().amax((1, 2)) / expected_THC.abs().amax()
        assert error_T.max() < TOLERANCE[dtype], f"row {error_T.argmax()} of {rows}"


def _exact(q_THC: torch.Tensor, k_SGC: torch.Tensor, v_SGC: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows, in float64."""
    shared = q_THC.shape[1] // k_SGC.shape[1]
    k_SHC, v_SHC = (x.double().repeat_interleave(shared, 1) for x in (k_SGC, v_SGC))
    scores_HTS = torch.einsum("thc,shc->hts", q_THC.double(), k_SHC) * q_THC.shape[2] ** -0.5
    rows, tokens = scores_HTS.shape[1:]
    visible = torch.ones(rows, tokens, dtype=torch.bool, device=q_THC.device)
    scores_HTS.masked_fill_(~visible.tril_(tokens - rows), float("-inf"))
    return torch.einsum("hts,shc->thc", scores_HTS.softmax(-1), v_SHC)

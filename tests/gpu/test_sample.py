"""The sampling kernels against float64, against the reference, and against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.sample import Sampled, SampleParams, TokenTables, reference, sample
from tests.cpu.kernels.sample_oracle import (
    check_logprobs,
    check_token,
    pack,
    random_logits,
    random_rows,
)

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")


def poison() -> None:
    """Fills the memory that is handed out next."""
    for size in (8, 512, 4096, 1 << 20, 1 << 24):
        torch.full((size,), 0x7F, dtype=torch.uint8, device=GPU)


def drawn(logits_SV: Tensor, params: SampleParams, tables: TokenTables | None) -> Sampled:
    poison()
    result = sample(logits_SV, params, tables)
    poison()
    again = sample(logits_SV, params, tables)
    assert torch.equal(result.tokens_S, again.tokens_S)
    assert torch.equal(result.logprobs_S.view(torch.int32), again.logprobs_S.view(torch.int32))
    return result


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (151_936, torch.float32),
        (151_936, torch.bfloat16),
        (32_003, torch.float16),
        (1000, torch.bfloat16),
        (31, torch.float32),
    ],
)
def test_against_float64_and_the_reference(vocabulary: int, dtype: torch.dtype) -> None:
    asked = random_rows(vocabulary, 32, vocabulary)
    logits_SV = random_logits(vocabulary, 32, vocabulary).to(dtype)
    params, tables = pack(asked, vocabulary, GPU)
    before = logits_SV.to(GPU)
    result = drawn(before, params, tables)
    assert torch.equal(before.cpu(), logits_SV)
    cpu_params, cpu_tables = pack(asked, vocabulary, CPU)
    wanted_S = reference.sample(logits_SV, cpu_params, cpu_tables)
    tokens = result.tokens_S.tolist()
    for token, logits_V, entry, uniform in zip(
        tokens, logits_SV, asked, cpu_params.uniform.tolist(), strict=True
    ):
        check_token(token, logits_V, entry, uniform)
    same = (result.tokens_S.cpu() == wanted_S).double().mean().item()
    assert same > 0.9, f"{same:.3f} of the tokens are the reference's"
    check_logprobs(result, logits_SV, asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    asked = random_rows(5, 256, 151_936)
    logits_SV = random_logits(5, 256, 151_936).to(GPU, dtype)
    params, tables = pack(asked, 151_936, GPU)
    together = drawn(logits_SV, params, tables)
    for row in range(0, 256, 5):
        own = SampleParams(params.packed_SF[row : row + 1].contiguous())
        alone = sample(logits_SV[row : row + 1], own, tables)
        assert torch.equal(alone.tokens_S[0], together.tokens_S[row])
        one, same = alone.logprobs_S[0], together.logprobs_S[row]
        assert torch.equal(one.view(torch.int32), same.view(torch.int32))


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_tokens_that_are_all_equal(value: float) -> None:
    """More equals than any list of candidates holds: all of them are kept."""
    asked = random_rows(6, 64, 40_000, adjusted=False)
    logits_SV = torch.full((64, 40_000), value)
    logits_SV[::2, ::3] = value - 5
    params, _ = pack(asked, 40_000, GPU)
    result = drawn(logits_SV.to(GPU), params, None)
    for token, logits_V, entry, uniform in zip(
        result.tokens_S.tolist(), logits_SV, asked, params.uniform.tolist(), strict=True
    ):
        check_token(token, logits_V, entry, uniform)


def test_a_graph_samples_what_lies_in_its_tensors_now() -> None:
    vocabulary = 151_936
    params, tables = pack(random_rows(7, 16, vocabulary), vocabulary, GPU)
    logits_SV = random_logits(7, 16, vocabulary).to(GPU)
    sample(logits_SV, params, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits_SV, params, tables)
    for seed in (8, 9):
        others, _ = pack(random_rows(seed, 16, vocabulary), vocabulary, GPU)
        params.packed_SF.copy_(others.packed_SF)
        logits_SV.copy_(random_logits(seed, 16, vocabulary))
        graph.replay()
        assert torch.equal(captured.tokens_S, sample(logits_SV, params, tables).tokens_S)


def test_garbage_logits_give_a_token_of_the_vocabulary() -> None:
    params, tables = pack(random_rows(8, 64, 151_936), 151_936, GPU)
    for value in (float("nan"), float("inf"), -float("inf")):
        tokens_S = sample(torch.full((64, 151_936), value, device=GPU), params, tables).tokens_S
        assert bool(((tokens_S >= 0) & (tokens_S < 151_936)).all())

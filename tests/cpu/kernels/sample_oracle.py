"""What `sample` may draw, in float64 and by sorting: for its tests on every device."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import torch
from torch import Tensor

from fourfold.kernels.sample import Sampled, SampleParams, SampleRow, TokenTables, noise_key


@dataclasses.dataclass(frozen=True)
class Asked:
    """One row: what it asks for, and what its sample has said."""

    row: SampleRow
    prompt: list[int]
    output: list[int]
    bias: dict[int, float]


def random_rows(seed: int, rows: int, vocabulary: int, *, adjusted: bool = True) -> list[Asked]:
    """Rows of all kinds, greedy ones among them, each in the slot of its place."""
    random = Random(seed)
    asked = []
    for slot in range(rows):
        is_adjusted, is_biased = adjusted and random.random() < 0.5, random.random() < 0.5
        row = SampleRow(
            noise_key(random.getrandbits(64), slot),
            random.randrange(1 << 20),
            temperature=random.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
            top_k=random.choice([0, 0, 1, 5, 50, 700, 1 << 30]),
            top_p=random.choice([1.0, 1.0, 0.0, 0.1, 0.9, 0.999]),
            min_p=random.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
            repetition_penalty=random.choice([1.0, 1.3]),
            presence_penalty=random.choice([0.0, 0.6]),
            frequency_penalty=random.choice([0.0, -0.4]),
            slot=slot,
            adjusted=is_adjusted,
            biased=is_adjusted and is_biased,
            logprob=random.random() < 0.8,
        )
        prompt, output = ([random.randrange(vocabulary) for _ in range(60)] for _ in range(2))
        bias = {random.randrange(vocabulary): random.gauss(0, 3) for _ in range(3)}
        asked.append(Asked(row, prompt, [*output, output[0]], bias if row.biased else {}))
    return asked


def pack(
    asked: list[Asked], vocabulary: int, device: torch.device
) -> tuple[SampleParams, TokenTables]:
    """What the verb takes."""
    tables = TokenTables(len(asked), vocabulary, device)
    for slot, entry in enumerate(asked):
        tables.start(slot, entry.prompt, entry.output, entry.bias)
    return SampleParams.pack([entry.row for entry in asked], device), tables


def random_logits(seed: int, rows: int, vocabulary: int) -> Tensor:
    """Rows from flat to peaked, with outliers and masked tokens; float32."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.3, 1.0, 3.0, 8.0])[torch.arange(rows) % 4, None]
    logits_SV = torch.randn(rows, vocabulary, generator=generator) * spread
    likely = torch.randint(vocabulary, (rows, 3), generator=generator)
    logits_SV.scatter_(1, likely, torch.rand(rows, 3, generator=generator) * 20)
    masked = torch.rand(rows, vocabulary, generator=generator) < 0.1
    return logits_SV.masked_fill(masked, -torch.inf)


def check_token(
    token: int, logits_V: Tensor, asked: Asked, uniform: float, tolerance: float = 5e-5
) -> None:
    """A token may be drawn if its part of [0, 1) holds the row's number, up to the rounding of
    float32 sums, which `tolerance` bounds."""
    adjusted = adjust(logits_V.double(), asked)
    row = asked.row
    if row.temperature < 1e-4:
        assert token == int(adjusted.argmax())
        return
    below = adjusted.max() - adjusted
    weight = (-below / row.temperature).exp()
    reach = reach_of(below, weight, row)
    assert below[token] <= reach * (1 + 1e-5) + 1e-5, (below[token], reach, row)
    sums = torch.where(below <= reach, weight, 0.0).cumsum(0)
    start, end = sums[token - 1] / sums[-1] if token else 0.0, sums[token] / sums[-1]
    assert start - tolerance <= uniform <= end + tolerance, (start, uniform, end, row)


def check_logprobs(result: Sampled, logits_SV: Tensor, asked: list[Asked]) -> None:
    """Of the rows that want it, and nan of the others."""
    tokens_S1 = result.tokens_S.cpu()[:, None]
    wanted_S = logits_SV.double().log_softmax(-1).gather(-1, tokens_S1)[:, 0]
    silent_S = torch.tensor([not entry.row.logprob for entry in asked])
    wanted_S = wanted_S.masked_fill(silent_S, torch.nan)
    found_S = result.logprobs_S.cpu().double()
    torch.testing.assert_close(found_S, wanted_S, rtol=1e-5, atol=1e-5, equal_nan=True)


def adjust(logits_V: Tensor, asked: Asked) -> Tensor:
    """Penalties and biases, token by token."""
    adjusted = logits_V.clone()
    row = asked.row
    if not row.adjusted:
        return adjusted
    for token in {*asked.prompt, *asked.output}:
        factor = row.repetition_penalty
        adjusted[token] *= factor if adjusted[token] <= 0 else 1 / factor
        count = asked.output.count(token)
        adjusted[token] -= count * row.frequency_penalty + (count > 0) * row.presence_penalty
    for token, bias in asked.bias.items():
        adjusted[token] += bias
    return adjusted


def reach_of(below_V: Tensor, weight_V: Tensor, row: SampleRow) -> float:
    """The greatest distance kept."""
    vocabulary = below_V.shape[0]
    order = below_V.argsort(stable=True)
    nearest = below_V[order]
    reach = float(nearest[row.top_k - 1]) if 0 < row.top_k < vocabulary else math.inf
    if row.top_p < 1:
        mass = torch.where(nearest <= reach, weight_V[order], 0.0).cumsum(0)
        short = int((mass < row.top_p * mass[-1]).sum())
        reach = min(reach, float(nearest[min(short, vocabulary - 1)]))
    if row.min_p > 0:
        reach = min(reach, -row.temperature * math.log(row.min_p))
    return reach

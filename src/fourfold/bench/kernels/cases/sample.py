"""Sampling: the vocabulary of Qwen3, full and small batches, with and without filters.

The work is the bytes of the logits, read once. The baseline is what PyTorch offers: a sort of the
vocabulary where top-p asks for it, and an exponential race.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fourfold.bench.kernels.case import Case
from fourfold.kernels.sample import SampleParams, SampleRow, TokenTables, noise_key, sample

_VOCABULARY = 151_936
_FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50, top-p 0.9, min-p": _FILTERS,
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "penalties and filters": {
        **_FILTERS,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "adjusted": True,
    },
}


def cases(device: torch.device) -> Iterator[Case]:
    """Every case, one after another."""
    for rows, dtype in itertools.product((1, 8, 32, 256), (torch.float32, torch.bfloat16)):
        logits_SV = _peaked(rows, device).to(dtype)
        for name in _SETTINGS:
            yield _case(name, "", logits_SV)
        if rows == 256:
            flat_SV = torch.randn(rows, _VOCABULARY, device=device).to(dtype)
            yield _case("top-p 0.9", ", standard normal", flat_SV)


def _peaked(rows: int, device: torch.device) -> Tensor:
    """Logits as language models have them: some thousand tokens well above the others, and few of
    them likely; float32."""
    generator = torch.Generator(device).manual_seed(rows)
    shape = (rows, _VOCABULARY)
    logits_SV = 2 * torch.randn(shape, generator=generator, device=device)
    places = torch.randint(20_000, (rows, 4000), generator=generator, device=device)
    lifts = 4.5 * torch.rand(places.shape, generator=generator, device=device)
    logits_SV.scatter_add_(1, places, lifts)
    lifts = 12 * torch.rand((rows, 40), generator=generator, device=device)
    return logits_SV.scatter_add_(1, places[:, :40], lifts)


def _case(name: str, suffix: str, logits_SV: Tensor) -> Case:
    rows, vocabulary = logits_SV.shape
    setting = _SETTINGS[name]
    row = SampleRow(0, 0, **setting)
    params = SampleParams.pack(
        [row._replace(key=noise_key(1, place), slot=place) for place in range(rows)],
        logits_SV.device,
    )
    tables = None
    if row.adjusted:
        tables = TokenTables(rows, vocabulary, logits_SV.device)
        for slot in range(rows):
            said = torch.randint(vocabulary, (1500,)).tolist()
            tables.start(slot, said[:1000], said[1000:], {})

    def run() -> object:
        return sample(logits_SV, params, tables)

    def error() -> float:
        drawn = sample(logits_SV, params, tables)
        wanted_SV = logits_SV.double().log_softmax(-1)
        wanted_S = wanted_SV.gather(-1, drawn.tokens_S[:, None]).squeeze(-1)
        return float((drawn.logprobs_S - wanted_S).norm() / wanted_S.norm())

    plain = not row.adjusted
    return Case(
        kernel="sample",
        case=f"{rows} x {vocabulary} {str(logits_SV.dtype).removeprefix('torch.')}, {name}{suffix}",
        run=run,
        work=float(logits_SV.numel() * logits_SV.element_size()),
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=_by_sorting(logits_SV, row) if plain else None,
        baseline_name="PyTorch" if plain else None,
        mark=0.5 if rows == 256 else None,  # twice the time it takes to read them
        mark_of_ceiling=True,
    )


def _by_sorting(logits_SV: Tensor, row: SampleRow) -> Callable[[], object]:
    def run() -> Tensor:
        if row.temperature == 0:
            return logits_SV.argmax(-1)
        scaled_SV = logits_SV.float() / row.temperature
        if row.top_p == 1:
            weight_SV = scaled_SV.softmax(-1)
            return (weight_SV / torch.empty_like(weight_SV).exponential_()).argmax(-1)
        scaled_SV, tokens_SV = scaled_SV.sort(-1, descending=True)
        if row.top_k:
            scaled_SV[:, row.top_k :] = -torch.inf
        weight_SV = scaled_SV.softmax(-1)
        before_SV = weight_SV.cumsum(-1) - weight_SV
        kept_SV = (before_SV < row.top_p) & (weight_SV >= row.min_p * weight_SV[:, :1])
        race_SV = weight_SV / torch.empty_like(weight_SV).exponential_()
        place_S1 = race_SV.masked_fill(~kept_SV, 0.0).argmax(-1, keepdim=True)
        return tokens_SV.gather(-1, place_S1).squeeze(-1)

    return run

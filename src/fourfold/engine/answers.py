"""What is read back of a step: tokens, log-probabilities, those of prompts.

Everything is asked for while the step is enqueued; the answers wait for the device until exactly
that has been computed, not for what was enqueued since.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fourfold.engine.messages import TokenLogprob
from fourfold.engine.program import StepOutputs
from fourfold.engine.sampler import likeliest, logprobs
from fourfold.engine.scheduler import Sampled

PromptLogprobs = Callable[[], tuple[TokenLogprob, ...]]
# Logits of a whole prompt are made this many rows at a time, to bound their memory.
_PROMPT_ROWS = 128


def fetch(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Enqueues copies to the host; the answer waits for them."""
    if tensors[0].device.type == "cpu":
        return lambda: list(tensors)
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives no type
    copied.record()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait


def fetch_drawn(outputs: StepOutputs, wanted: Sequence[int | None]) -> Callable[[], list[Sampled]]:
    """What was drawn for the first rows of a step, of which each wants so many alternatives, or no
    log-probability (None)."""
    count = len(wanted)
    if all(alternatives is None for alternatives in wanted):
        drawn = fetch(outputs.tokens_S[:count])
        return lambda: [Sampled(token=token) for token in drawn()[0].tolist()]
    places = [place for place, alternatives in enumerate(wanted) if alternatives]
    parts = [outputs.tokens_S[:count], outputs.logprobs_S[:count]]
    if places:
        assert outputs.logits_SV is not None
        place_S = torch.tensor(places).to(outputs.tokens_S.device, non_blocking=True)
        parts += likeliest(outputs.logits_SV[place_S], max(n or 0 for n in wanted))
    read = fetch(*parts)

    def answers() -> list[Sampled]:
        tokens_S, logprobs_S, *top = read()
        tops: list[tuple[tuple[int, float], ...]] = [()] * count
        if top:
            values, ids = (side.tolist() for side in top)
            for place, of_place in zip(places, zip(ids, values, strict=True), strict=True):
                tops[place] = tuple(zip(*of_place, strict=True))[: wanted[place]]
        entries = [
            # Summed in another order, the same logits give another last digit.
            TokenLogprob(token, dict(top).get(token, logprob), top)
            for token, logprob, top in zip(
                tokens_S.tolist(), logprobs_S.tolist(), tops, strict=True
            )
        ]
        return [
            Sampled(entry.token, None if alternatives is None else entry)
            for entry, alternatives in zip(entries, wanted, strict=True)
        ]

    return answers


def fetch_prompt(
    hidden_RD: Tensor,
    targets: Sequence[int],
    alternatives: int,
    logits: Callable[[Tensor], Tensor],
) -> PromptLogprobs:
    """Log-probabilities of the tokens after each of a prompt's rows."""
    parts: list[Tensor] = []
    for first in range(0, len(targets), _PROMPT_ROWS):
        after = torch.tensor(targets[first : first + _PROMPT_ROWS])
        hidden = hidden_RD[first : first + len(after)]
        target_S = after.to(hidden.device, non_blocking=True)
        chosen_S, top = logprobs(logits(hidden), target_S, alternatives)
        parts += (target_S, chosen_S, top.indices, top.values)
    read = fetch(*parts)

    def answers() -> tuple[TokenLogprob, ...]:
        entries: list[TokenLogprob] = []
        numbers = iter([part.tolist() for part in read()])
        for rows in zip(numbers, numbers, numbers, numbers, strict=True):
            entries += (
                TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
                for token, logprob, ids, values in zip(*rows, strict=True)
            )
        return tuple(entries)

    return answers

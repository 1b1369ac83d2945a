"""How many tokens of prompts a step takes that decodes, too.

Each of them makes everybody's next token later, so they are few as long as prompts come singly.
Where prompts queue, each waits for all before it, and steps take more.
"""

from __future__ import annotations

from collections.abc import Iterable

from fourfold.engine.messages import Stage
from fourfold.engine.sequence import Sequence

# So many steps of a size have to wait before steps are as large.
_BACKLOG_STEPS = 4


def mixed_sizes(least: int, chunk_multiple: int) -> tuple[int, ...]:
    """The sizes, ascending: few, for each has graphs of its own.

    Args:
        least: `EngineConfig.mixed_tokens`.
        chunk_multiple: what chunks of prompts are multiples of.
    """
    least = max(least, chunk_multiple)
    return least, 2 * least, 4 * least


def mixed_budget(sizes: tuple[int, ...], prompts: Iterable[Sequence]) -> int:
    """The largest size of which `_BACKLOG_STEPS` steps wait, or else the smallest. `prompts`: those
    that have a slot or could have one."""
    smallest, *larger = sizes
    waits = 0
    for prompt in prompts:
        # Samples of a prompt that another computes share its pages.
        if prompt.stage is not Stage.DECODE and prompt.leader is None:
            waits += prompt.length - max(prompt.computed, prompt.found)
        if waits >= _BACKLOG_STEPS * larger[-1]:
            break
    enough = [size for size in larger if waits >= _BACKLOG_STEPS * size]
    return enough[-1] if enough else smallest

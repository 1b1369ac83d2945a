"""What a node's pages are, so that two nodes know whether they can exchange them."""

from __future__ import annotations

import msgspec

from fourfold.errors import ConfigError


class PageFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of N tokens: a record for each layer, and rows of the page that is still filling.

    Records are `code` values [2, G, N, C] (for `int8` and `fp8` codes in the order and with the
    scales of `kernels.pages.layout`); open rows are `[2, tokens, G, C]` of `open_code`.
    """

    layers: int
    kv_heads: int
    head_width: int
    page_tokens: int
    code: str
    """int8, fp8, or the name of a floating dtype."""
    open_code: str
    """The name of a floating dtype."""
    record_bytes: int
    """Of one page in one layer."""


def check_agreement(mine: PageFormat, theirs: PageFormat, my_model: str, their_model: str) -> None:
    """Raises `ConfigError` where pages of one node could never be the other's.

    Codes may differ: the sender converts. How many pages there are, and on what device, is each
    node's own business.
    """
    if my_model != their_model:
        raise ConfigError(
            f"this worker serves the model {my_model}, the other one {their_model}; "
            "start both with the same checkpoint and precision"
        )
    for field in ("layers", "kv_heads", "head_width", "page_tokens"):
        ours, other = getattr(mine, field), getattr(theirs, field)
        if ours != other:
            raise ConfigError(f"this worker's pages have {field} {ours}, the other one's {other}")

"""Finding the pages that sequences share: a radix tree over their page tables.

Samples of one prompt, and prompts with a common beginning, hold the same page at the same place.
Sequences are sorted by their tables, so that sharers are neighbours and a node of the tree is an
interval of them with a run of pages; common prefixes of neighbours give all nodes in one pass.

Shapes: B sequences, L pages of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class SharedRun(NamedTuple):
    """Sequences at places `first : end` of the order hold pages `start : stop` of their tables in
    common, and not all of them hold more."""

    first: int
    end: int
    start: int
    stop: int


def find_shared_runs(
    pages: NDArray[np.int32], start_B: Ints, sealed_B: Ints
) -> tuple[Ints, list[SharedRun]]:
    """An order of the sequences, [B], and the nodes of their tree, ancestors first.

    Sequence b has the sealed pages `pages[start_B[b]:][:sealed_B[b]]`.
    """
    order_B = np.arange(len(sealed_B), dtype=np.int64)
    some = order_B[sealed_B > 0]
    first = pages[start_B[some]]
    by_first = np.argsort(first, kind="stable")
    same = np.diff(first[by_first]) == 0
    if not same.any():
        return order_B, []
    shares = np.append(same, False)
    shares[1:] |= same
    # Big-endian bytes compare as the numbers do, and comparing bytes is one pass of memcmp.
    words = pages.astype(">i4")
    begin, end = start_B.tolist(), (start_B + sealed_B).tolist()
    keys = {b: words[begin[b] : end[b]].tobytes() for b in some[by_first[shares]].tolist()}
    members = np.array(sorted(keys, key=keys.__getitem__), np.int64)
    alone = np.ones(len(order_B), bool)
    alone[members] = False
    common = _common_prefixes(pages, start_B[members], sealed_B[members])
    return np.concatenate((members, order_B[alone])), _nodes(common.tolist())


def _common_prefixes(pages: NDArray[np.int32], start_B: Ints, sealed_B: Ints) -> Ints:
    """How many pages each sequence has in common with the next, [B - 1]."""
    shorter = np.minimum(sealed_B[1:], sealed_B[:-1])
    place_L = np.arange(int(shorter.max()) + 1)
    table_BL = pages[np.minimum(start_B[:, None] + place_L, len(pages) - 1)]
    differs = table_BL[1:] != table_BL[:-1]
    differs |= place_L >= shorter[:, None]
    common: Ints = differs.argmax(1)
    return common


def _nodes(common: list[int]) -> list[SharedRun]:
    """The nodes of the tree whose neighbouring leaves share `common` pages."""
    nodes: list[SharedRun] = []
    open_nodes = [(0, 0)]  # depth in pages, first leaf
    for leaf, depth in enumerate([*common, 0], start=1):
        first = leaf - 1
        while open_nodes[-1][0] > depth:
            stop, first = open_nodes.pop()
            nodes.append(SharedRun(first, leaf, max(depth, open_nodes[-1][0]), stop))
        if open_nodes[-1][0] < depth:
            open_nodes.append((depth, first))
    nodes.reverse()
    return nodes

"""Pages arrive exactly, wherever they lie on either side, and each side learns how it ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fourfold.transport.node import Node
from tests.cpu.transport.nodes import Memory, Outcome, make_node, send


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    sender, receiver = make_node("prefill", 1), make_node("decode", 2)
    yield sender, receiver
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    ("layers", "pages", "page_bytes", "open_bytes"),
    [(1, 1, 1, 0), (4, 30, 16400, 3000), (3, 0, 16400, 2048), (2, 3, (1 << 20) + 5, 0)],
)
def test_pages_and_open_rows_arrive(
    nodes: tuple[Node, Node], layers: int, pages: int, page_bytes: int, open_bytes: int
) -> None:
    sender, receiver = nodes
    source = Memory(layers, pages, page_bytes, open_bytes).shuffle(1).fill(2)
    target = Memory(layers, pages, page_bytes, open_bytes).shuffle(3)
    arrived = Outcome()
    receiver.expect(5, 1, target, arrived)
    _, sent = send(sender, receiver, 5, source)
    assert sent.wait() is None
    assert arrived.wait() is None
    assert target.content() == source.content()
    receiver.forget(5)

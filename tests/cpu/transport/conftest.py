"""A receiver, and a peer of it that says what it likes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fourfold.transport import Node
from tests.cpu.transport.forger import Forger
from tests.cpu.transport.nodes import make_node


@pytest.fixture(scope="package")
def receiver() -> Iterator[Node]:
    """One for all who leave it as they found it."""
    node = make_node("decode", 2)
    yield node
    node.close()


@pytest.fixture
def forger(receiver: Node) -> Iterator[Forger]:
    """Linked to `receiver`, whose leases 1 to 9 are for it."""
    peer = Forger(receiver.peer)
    yield peer
    peer.close()
    for lease in range(1, 10):
        receiver.forget(lease)

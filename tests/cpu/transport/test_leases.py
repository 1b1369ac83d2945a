"""Who may write into a lease."""

from __future__ import annotations

import time

import msgspec
import pytest

from fourfold.transport import Part
from fourfold.transport import leases as leases_module
from fourfold.transport.control import Complete, Failed
from fourfold.transport.frames import Header, Kind
from fourfold.transport.leases import Leases
from fourfold.transport.notifier import Notifier
from tests.cpu.transport.nodes import Memory, Outcome

LEASE = 5
FRAME = Header(
    kind=Kind.DATA,
    epoch=2,
    lease=LEASE,
    part=Part.PAGES,
    layer=0,
    layers=1,
    first=0,
    count=1,
    length=100,
    checksum=0,
)


class Sender:
    """A link as leases see it."""

    epoch = 1

    def __init__(self) -> None:
        self.lost = False
        self.told: list[Complete | Failed] = []
        self.refused: list[int] = []
        self.events: list[str] = []

    def tell(self, message: Complete | Failed) -> None:
        self.told.append(message)

    def refuse(self, lease: int) -> None:
        self.refused.append(lease)

    def count(self, event: str) -> None:
        self.events.append(event)


def test_a_broken_link_begins_nothing() -> None:
    """Its streams may still bring what they had received before; nothing would end that lease."""
    notifier = Notifier("decode")
    leases, broken, good, done = Leases(notifier), Sender(), Sender(), Outcome()
    leases.expect(LEASE, None, Memory(1, 1, 100), done)
    leases.lose(broken, "the link ended")
    assert leases.claim(FRAME, broken) is None
    leases.sent(LEASE, broken, 1)
    leases.cancel(LEASE, broken)
    assert broken.events == ["stale"]
    claim = leases.claim(FRAME, good)
    assert claim is not None
    assert leases.land(claim, None)
    assert done.wait() is None
    assert good.told == [Complete(LEASE)]
    assert leases.forget(LEASE, pytest.fail)
    notifier.close(10)


def test_the_sender_learns_of_a_lease_that_is_forgotten_after_it_failed_amid_a_page() -> None:
    """It has sent all it had, so nothing it would still do brings it an answer."""
    notifier = Notifier("decode")
    leases, sender, done = Leases(notifier), Sender(), Outcome()
    leases.expect(LEASE, None, Memory(1, 2, 100), done)
    altered = leases.claim(FRAME, sender)
    late = leases.claim(msgspec.structs.replace(FRAME, first=1), sender)
    assert altered is not None
    assert late is not None
    leases.sent(LEASE, sender, 2)
    leases.land(altered, "it arrived altered")
    assert not sender.told  # a thread still writes into the lease
    left: list[bool] = []
    assert not leases.forget(LEASE, lambda: left.append(True))
    assert sender.told == [Failed(LEASE, "the receiver has taken its pages back", unwanted=True)]
    assert not left
    leases.land(late, None)
    notifier.close(10)
    assert left == [True]
    assert not done.calls


def test_a_link_that_stays_in_pages_that_were_taken_back_is_told_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases_module, "_GRACE_SECONDS", 0.0)
    notifier = Notifier("decode")
    leases, sender, other, left = Leases(notifier), Sender(), Sender(), Outcome()
    leases.expect(LEASE, None, Memory(1, 2, 100), Outcome())
    first = leases.claim(FRAME, sender)
    second = leases.claim(msgspec.structs.replace(FRAME, first=1), sender)
    assert first is not None
    assert second is not None
    assert not leases.clings(sender)
    assert not leases.forget(LEASE, lambda: left(None))
    leases.land(first, None)
    time.sleep(0.01)
    assert leases.clings(sender)
    assert not leases.clings(other)
    assert not left.calls
    leases.land(second, "its link ended")
    assert not leases.clings(sender)
    assert left.wait() is None
    notifier.close(10)
    assert left.calls == [None]

"""Pages arrive exactly, wherever they lie on either side, and each side learns how it ended."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.transport import Part, Piece
from fourfold.transport.notifier import Notifier
from fourfold.transport.stats import Counters
from fourfold.transport.transfers import Transfers
from tests.cpu.transport.nodes import (
    GATHERING_WAYS,
    WAIT_SECONDS,
    WAYS,
    Memory,
    Outcome,
    Pair,
    Way,
    cancel,
    forget,
    make_node,
    send,
    until,
)

LEASES = itertools.count(1000)


@pytest.fixture(scope="module", params=[*WAYS, *GATHERING_WAYS])
def shared_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param, slice_bytes=4096)
    yield pair
    pair.close()


@pytest.fixture
def pair(shared_pair: Pair) -> Pair:
    shared_pair.reuse()
    return shared_pair


SHAPES = [
    (1, 1, 1, 0),
    (4, 30, 16400, 3000),
    (3, 0, 16400, 2048),
    (30, 2, 100, 60),
    (2, 3, (1 << 20) + 5, 0),
    (2, 2000, 3, 0),
]


@pytest.mark.parametrize(("layers", "pages", "page_bytes", "open_bytes"), SHAPES)
def test_pages_and_open_rows_arrive(
    pair: Pair, layers: int, pages: int, page_bytes: int, open_bytes: int
) -> None:
    lease = next(LEASES)
    source = pair.memory(layers, pages, page_bytes, open_bytes).shuffle(1).fill(2)
    target = Memory(layers, pages, page_bytes, open_bytes).shuffle(3)
    arrived = Outcome()
    pair.receiver.expect(lease, 1, target, arrived)
    _, sent = send(pair.sender, pair.receiver, lease, source)
    assert sent.wait() is None
    assert arrived.wait() is None
    assert target.content() == source.content()
    pair.receiver.forget(lease)
    (stats,) = pair.sender.stats()
    assert stats.path == pair.way.described
    assert stats.tested > 0


@pytest.mark.parametrize("way", [*WAYS, *GATHERING_WAYS])
@pytest.mark.parametrize(
    ("page_bytes", "scattered_here", "scattered_there"),
    [
        (16384, True, True),
        (16384, True, False),
        (16384, False, True),
        (16400, True, True),
        (1001, True, True),
        (200_000, True, True),
    ],
)
def test_frames_of_many_pages_arrive_wherever_those_lie(
    way: Way, page_bytes: int, scattered_here: bool, scattered_there: bool
) -> None:
    pair = Pair(way)
    source, target = pair.memory(2, 70, page_bytes).fill(2), Memory(2, 70, page_bytes)
    if scattered_here:
        source.shuffle(1)
    if scattered_there:
        target.shuffle(3)
    arrived = Outcome()
    pair.receiver.expect(1, 1, target, arrived)
    _, sent = send(pair.sender, pair.receiver, 1, source)
    assert sent.wait() is arrived.wait() is None
    assert target.content() == source.content()
    pair.close()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    pages = draw(st.integers(0, 40))
    open_bytes = draw(st.integers(0 if pages else 1, 3000))
    return draw(st.integers(1, 5)), pages, draw(st.integers(1, 3000)), open_bytes


def cut_at_random(pieces: Iterator[Piece], chance: random.Random) -> list[Piece]:
    """The same pieces in another order, with gather lists cut at random."""
    cut = []
    for piece in pieces:
        data: list[memoryview] = []
        for view in piece.data:
            at = chance.randint(0, len(view))
            data += [view[:at], view[at:]]
        cut.append(Piece(piece.part, piece.layer, piece.first, piece.count, data))
    chance.shuffle(cut)
    return cut


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(layouts(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_several_leases_at_once_are_exact(
    pair: Pair, leases: list[tuple[int, int, int, int]], seed: int
) -> None:
    pair.reuse()
    chance = random.Random(seed)
    sources = [pair.memory(*lease).fill(seed).shuffle(seed) for lease in leases]
    targets = [Memory(*lease).shuffle(seed + 1) for lease in leases]
    outcomes, transfers, queued = [], [], []
    numbers = [next(LEASES) for _ in leases]
    for number, source, target in zip(numbers, sources, targets, strict=True):
        outcomes += [Outcome(), Outcome()]
        pair.receiver.expect(number, None, target, outcomes[-1])
        transfer = pair.sender.link(pair.receiver.peer).begin(number, outcomes[-2])
        transfers.append(transfer)
        pieces = cut_at_random(source.pieces(chance.randint(1, 20)), chance)
        queued += [(transfer, piece) for piece in pieces]
    chance.shuffle(queued)
    for transfer, piece in queued:
        transfer.write([piece])
    for transfer in transfers:
        transfer.finish()
    assert [outcome.wait() for outcome in outcomes] == [None] * len(outcomes)
    assert [target.content() for target in targets] == [source.content() for source in sources]
    for number in numbers:
        pair.receiver.forget(number)
    assert all(len(outcome.calls) == 1 for outcome in outcomes)


def test_a_transfer_of_nothing_is_done(pair: Pair) -> None:
    lease = next(LEASES)
    arrived = Outcome()
    pair.receiver.expect(lease, None, Memory(2, 0, 10), arrived)
    assert arrived.wait() is None
    pair.receiver.forget(lease)


def test_what_is_missing_fails_on_both_sides(pair: Pair) -> None:
    lease = next(LEASES)
    source, arrived, sent = pair.memory(2, 4, 100).fill(1), Outcome(), Outcome()
    pair.receiver.expect(lease, None, Memory(2, 4, 100), arrived)
    transfer = pair.sender.link(pair.receiver.peer).begin(lease, sent)
    transfer.write(list(source.pieces(1))[:-1])
    transfer.finish()
    for outcome in (arrived, sent):
        assert "missing runs: 1 of 2 layers of 4 pages" in outcome.failure()
    pair.receiver.forget(lease)


@pytest.mark.parametrize(
    ("piece", "why"),
    [
        ((Part.PAGES, 2, 0, 1, 100), "into 2 layers of 4 pages"),
        ((Part.PAGES, 0, 3, 2, 100), "into 2 layers of 4 pages"),
        ((Part.OPEN, 0, 0, 1, 100), "into 2 layers of 4 pages"),
        ((Part.PAGES, 0, 0, 1, 99), "has 100 bytes for a run of 99"),
    ],
)
def test_a_run_that_the_lease_has_not_fails_on_both_sides(
    pair: Pair, piece: tuple[Part, int, int, int, int], why: str
) -> None:
    lease = next(LEASES)
    part, layer, first, count, page_bytes = piece
    target, arrived, sent = Memory(2, 4, 100), Outcome(), Outcome()
    pair.receiver.expect(lease, None, target, arrived)
    transfer = pair.sender.link(pair.receiver.peer).begin(lease, sent)
    data = pair.memory(1, 1, count * page_bytes).fill(1).buffer
    transfer.write([Piece(part, layer, first, count, [data])])
    for outcome in (arrived, sent):
        assert why in outcome.failure()
    assert not any(target.buffer)
    pair.receiver.forget(lease)


def test_a_landing_that_fails_fails_its_lease_only(pair: Pair) -> None:
    class Broken(Memory):
        def views(self, part: Part, layer: int, first: int, count: int) -> list[memoryview]:
            raise LookupError("its pages are gone")

    bad, good = Outcome(), Outcome()
    leases = (next(LEASES), next(LEASES))
    target = Memory(1, 2, 5000)
    pair.receiver.expect(leases[0], None, Broken(1, 2, 5000), bad)
    pair.receiver.expect(leases[1], None, target, good)
    source = pair.memory(1, 2, 5000).fill(3)
    sent = [send(pair.sender, pair.receiver, lease, source)[1] for lease in leases]
    assert "its pages are gone" in bad.failure()
    assert "its pages are gone" in sent[0].failure()
    assert good.wait() is sent[1].wait() is None
    assert target.content() == source.content()
    for lease in leases:
        pair.receiver.forget(lease)


def test_an_unknown_lease_fails_at_the_sender(pair: Pair) -> None:
    _, sent = send(pair.sender, pair.receiver, 404, pair.memory(2, 4, 100))
    assert "no such lease" in sent.failure()
    # That it was all may be heard before any of it.
    until(lambda: sum(stats.stale for stats in pair.receiver.stats()) > 0)


def test_a_lease_for_another_incarnation_takes_nothing(pair: Pair) -> None:
    lease = next(LEASES)
    target, arrived = Memory(2, 4, 100), Outcome()
    pair.receiver.expect(lease, 99, target, arrived)
    _, sent = send(pair.sender, pair.receiver, lease, pair.memory(2, 4, 100).fill(1))
    assert "no such lease" in sent.failure()
    assert not any(target.buffer)
    assert arrived.calls == []
    pair.receiver.forget(lease)


def failures(pair: Pair) -> tuple[int, int]:
    """Transfers that failed at the sender, and at the receiver."""
    [there], [here] = pair.sender.stats(), pair.receiver.stats()
    return there.failed, here.failed


def test_a_cancelled_transfer_reads_nothing_more_and_says_nothing(pair: Pair) -> None:
    arrived, sent = Outcome(), Outcome()
    _, stood = send(pair.sender, pair.receiver, next(LEASES), pair.memory(1, 1, 10))
    stood.wait()
    before = failures(pair)
    first, second = next(LEASES), next(LEASES)
    source = pair.memory(4, 500, 4096).fill(1)
    target = Memory(4, 500, 4096)
    pair.receiver.expect(first, None, target, arrived)
    transfer = pair.sender.link(pair.receiver.peer).begin(first, sent)
    transfer.write(list(source.pieces()))
    cancel(transfer)
    assert "cancelled" in arrived.failure()
    expected = source.content()
    source.fill(2)  # whatever is written after this would be noticed
    forget(pair.receiver, first)
    for got, want in zip(target.content(), expected, strict=True):
        assert got in (want, bytes(4096))
    again = Outcome()
    pair.receiver.expect(second, None, target, again)
    _, more = send(pair.sender, pair.receiver, second, source)
    assert more.wait() is again.wait() is None
    assert target.content() == source.content()
    pair.receiver.forget(second)
    assert sent.calls == []
    assert failures(pair) == before  # a client that leaves is no trouble of the network


def test_a_transfer_that_is_done_before_it_is_finished_can_be_cancelled(pair: Pair) -> None:
    lease, arrived = next(LEASES), Outcome()
    source, target = pair.memory(1, 2, 100), Memory(1, 2, 100)
    link = pair.sender.link(pair.receiver.peer)
    for _ in range(2):  # nothing of the first is left
        pair.receiver.expect(lease, None, target, arrived)
        transfer = link.begin(lease, Outcome())
        transfer.write(list(source.pieces()))
        arrived.wait()
        link.round_trips(1, WAIT_SECONDS)  # the sender has heard of it, too
        cancel(transfer)
        pair.receiver.forget(lease)


def test_a_forgotten_lease_is_not_written(pair: Pair) -> None:
    """The receiver takes pages back amid a transfer and uses them for something else."""
    for lease in range(100, 105):
        take_back_amid(pair, lease)
        pair.reuse()


def take_back_amid(pair: Pair, lease: int) -> None:
    source, target = pair.memory(4, 100, 4096).fill(1), Memory(4, 100, 4096)
    pair.receiver.expect(lease, None, target, Outcome())
    _, sent = send(pair.sender, pair.receiver, lease, source)
    until(lambda: any(target.buffer) or sent.calls)
    forget(pair.receiver, lease)
    target.fill(2)
    expected = target.content()
    sent.wait()
    assert target.content() == expected


def test_written_in_parts_while_it_is_computed(pair: Pair) -> None:
    lease = next(LEASES)
    source, target = pair.memory(3, 20, 1000, 500).fill(1), Memory(3, 20, 1000, 500)
    arrived, sent = Outcome(), Outcome()
    pair.receiver.expect(lease, None, target, arrived)
    transfer = pair.sender.link(pair.receiver.peer).begin(lease, sent)
    for piece in source.pieces(3):
        transfer.write([piece])
    assert arrived.wait() is None
    assert sent.calls == []  # its owner has not said that this is all
    transfer.finish()
    assert sent.wait() is None
    assert target.content() == source.content()
    pair.receiver.forget(lease)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(Part.PAGES, 0, 0, 3, [memoryview(b"1234")]),
        Piece(Part.PAGES, 0, 0, 1, []),
        Piece(Part.PAGES, 0, 0, 0, [memoryview(b"1234")]),
        Piece(Part.OPEN, 0, 1, 1, [memoryview(b"1234")]),
        Piece(Part.PAGES, -1, 0, 1, [memoryview(b"1234")]),
        Piece(Part.PAGES, 0, 1 << 32, 1, [memoryview(b"1234")]),
    ],
)
def test_a_piece_that_makes_no_sense_is_refused(pair: Pair, piece: Piece) -> None:
    lease = next(LEASES)
    transfer = pair.sender.link(pair.receiver.peer).begin(lease, Outcome())
    with pytest.raises(ValueError, match=r"pages of one size|one run a layer|in a frame"):
        transfer.write([piece])
    cancel(transfer)


def test_one_lease_has_one_transfer_and_one_landing(pair: Pair) -> None:
    lease = next(LEASES)
    transfer = pair.sender.link(pair.receiver.peer).begin(lease, Outcome())
    with pytest.raises(ValueError, match="under way"):
        pair.sender.link(pair.receiver.peer).begin(lease, Outcome())
    cancel(transfer)
    for number in (-1, 1 << 64):
        with pytest.raises(ValueError, match="no number of a lease"):
            pair.sender.link(pair.receiver.peer).begin(number, Outcome())
    pair.receiver.expect(lease, None, Memory(1, 1, 1), Outcome())
    with pytest.raises(ValueError, match="in use"):
        pair.receiver.expect(lease, None, Memory(1, 1, 1), Outcome())
    pair.receiver.forget(lease)


def test_callbacks_may_call_the_transport(pair: Pair) -> None:
    """From `done`, the lease may be forgotten and the next transfer begun."""
    source, targets = pair.memory(2, 3, 100).fill(1), [Memory(2, 3, 100) for _ in range(5)]
    leases, last = [next(LEASES) for _ in targets], threading.Event()

    def begin(number: int) -> None:
        def arrived(reason: str | None) -> None:
            assert reason is None
            pair.receiver.forget(leases[number])
            if number + 1 < len(targets):
                begin(number + 1)
            else:
                last.set()

        pair.receiver.expect(leases[number], None, targets[number], arrived)
        send(pair.sender, pair.receiver, leases[number], source)

    begin(0)
    assert last.wait(30)
    assert all(target.content() == source.content() for target in targets)


def test_many_links_at_once() -> None:
    receiver = make_node("decode", 2)
    senders = [make_node(f"prefill-{number}", number + 10) for number in range(8)]
    target = {number: Memory(2, 10, 1000) for number in range(8)}
    outcomes = []
    for number, sender in enumerate(senders):
        arrived = Outcome()
        receiver.expect(number, number + 10, target[number], arrived)
        source = Memory(2, 10, 1000).fill(number)
        outcomes += [arrived, send(sender, receiver, number, source)[1]]
    assert [outcome.wait() for outcome in outcomes] == [None] * 16
    for number in range(8):
        assert target[number].content() == Memory(2, 10, 1000).fill(number).content()
    stats = receiver.stats()
    assert {each.peer for each in stats} == {f"prefill-{number}" for number in range(8)}
    assert all(each.bytes == 20_000 and not each.sends for each in stats)
    for node in (*senders, receiver):
        node.close()


def test_frames_are_no_larger_than_the_receiver_takes() -> None:
    receiver = make_node("decode", 2, max_payload=1 << 20, slice_bytes=1 << 20)
    sender = make_node("prefill", 1, slice_bytes=4 << 20)
    source, target, arrived = Memory(1, 9, 1 << 19).fill(1), Memory(1, 9, 1 << 19), Outcome()
    receiver.expect(1, None, target, arrived)
    assert send(sender, receiver, 1, source)[1].wait() is None
    assert arrived.wait() is None
    assert target.content() == source.content()
    sender.close()
    receiver.close()


@pytest.mark.parametrize("deals", [True, False])
def test_no_stream_takes_all_that_only_says_where_pages_lie(deals: bool) -> None:
    notifier = Notifier("test")
    transfers = Transfers(10, Counters("peer", sends=True), notifier, lambda message: None)
    transfers.open(1000, 10, 2 if deals else 0)
    transfers.write(
        transfers.begin(1, Outcome()),
        [Piece(Part.PAGES, 0, page, 1, [memoryview(bytes(10))]) for page in range(8)],
    )
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()

    def take_all() -> None:
        while transfers.take(0) is not None:
            taken.put(0)

    thread = threading.Thread(target=take_all)
    thread.start()
    for expected in (2, 3, 4, 5) if deals else (8,):
        until(lambda expected=expected: taken.qsize() == expected)  # type: ignore[misc]
        time.sleep(0.01)
        assert taken.qsize() == expected  # it waits for the other
        if expected < 5:
            assert transfers.take(1) is not None
    transfers.stop("the test is over")
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    notifier.close(WAIT_SECONDS)

"""The sender's transfers: what waits to be sent, what may be, and how each ends.

The mirror of `leases`. A transfer ends when the receiver says so or its link breaks, but not before
the last thread has left its pages; the one who cancels it is told of that too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from fourfold.transport.control import Cancel, Finish
from fourfold.transport.cutting import Cutter, Slice
from fourfold.transport.notifier import Notifier
from fourfold.transport.pieces import Part, Piece
from fourfold.transport.stats import Counters

Done = Callable[[str | None], None]

_AHEAD = 2
"""Frames that a stream may have taken more than another, where they are dealt out evenly."""
_GRACE_SECONDS = 1.0
"""For a frame to leave by itself after its transfer was cancelled."""


class Transfer:
    """Pages on their way into one lease. For one thread.

    `done` is called once, from a thread of the transport, unless the transfer is cancelled first.
    """

    def __init__(
        self, transfers: Transfers, lease: int, done: Done, pulled: Mapping[Part, int] | None
    ) -> None:
        self._transfers = transfers
        self.lease, self.done, self.pulled = lease, done, pulled
        # What follows changes under the lock of `Transfers` only.
        self.queued = 0
        """Bytes that wait to be sent."""
        self.sending = 0
        """Frames that are being sent now."""
        self.frames = 0
        self.finishing = False
        self.told = False
        """Whether the receiver knows that this is all."""
        self.over = False
        self.problem: str | None = None
        self.settled = False
        self.cancelled: float | None = None
        """When it was."""
        self.left: Callable[[], None] | None = None
        """To be called instead of `done` when no thread reads its pieces."""

    def write(self, pieces: Sequence[Piece]) -> None:
        """Queues runs, in any order; never waits for the network.

        Their memory must stay as it is until the transfer is done or cancelled. Raises
        `ValueError` for a piece that makes no sense.
        """
        self._transfers.write(self, pieces)

    def finish(self) -> None:
        """Says that there are no more pieces: `done(None)` follows when the receiver has verified
        everything it expects."""
        self._transfers.finish(self)

    def cancel(self, left: Callable[[], None]) -> bool:
        """Gives the transfer up, once; never waits. `done` is not called any more.

        Returns whether no thread of ours reads its pieces. Else one still sends from them, and
        `left` is called from a thread of the transport when it does not any more: after a moment,
        for a link that stands still is closed.
        """
        return self._transfers.cancel(self, left)


class Transfers:
    """All transfers of one link; for any thread."""

    def __init__(
        self,
        slice_bytes: int,
        counters: Counters,
        notifier: Notifier,
        tell: Callable[[Finish | Cancel], None],
    ) -> None:
        """`tell` sends the receiver a message; it is called only after `open`."""
        self._counters, self._notifier, self._tell = counters, notifier, tell
        self._changed = threading.Condition()
        self._cutter: Cutter[Transfer] = Cutter(slice_bytes)
        self._transfers: dict[int, Transfer] = {}
        self._open = False
        self._credit = 0
        self._taken: list[int] = []
        """Frames that each stream has taken, where they are dealt out evenly."""
        self._moved = time.monotonic()
        self.problem: str | None = None
        """Why nothing is sent any more."""

    def begin(self, lease: int, done: Done, pulled: Mapping[Part, int] | None = None) -> Transfer:
        """See `Link.begin`."""
        if not 0 <= lease < 1 << 64:
            raise ValueError(f"{lease} is no number of a lease")
        transfer = Transfer(self, lease, done, pulled)
        with self._changed:
            if lease in self._transfers:
                raise ValueError(f"a transfer into lease {lease} is under way")
            self._transfers[lease] = transfer
            if self.problem is not None:
                self._end(transfer, self.problem)
        return transfer

    def write(self, transfer: Transfer, pieces: Sequence[Piece]) -> None:
        with self._changed:
            assert not transfer.finishing, "a piece after the last"
            if transfer.over:
                return
            self._start_clock()
            transfer.queued += self._cutter.add(transfer, pieces)
            self._changed.notify_all()

    def finish(self, transfer: Transfer) -> None:
        with self._changed:
            self._start_clock()
            transfer.finishing = True
            self._say_finished(transfer)
            self._settle(transfer)

    def cancel(self, transfer: Transfer, left: Callable[[], None]) -> bool:
        with self._changed:
            assert transfer.cancelled is None, "a transfer is cancelled once"
            transfer.cancelled = time.monotonic()
            if not transfer.over:
                if self._open:
                    self._tell(Cancel(transfer.lease))
                self._end(transfer, "it was cancelled", counts=False)
            self._settle(transfer)
            if not transfer.sending:
                return True
            transfer.left = left
            return False

    def open(self, window: int, slice_bytes: int, streams: int) -> None:
        """Frames may be sent from now on, with so many bytes under way, and so many in each.
        `streams`: how many take equally many of them; 0 where each takes what it has room for."""
        with self._changed:
            self._open = True
            self._taken = [0] * streams
            self._cutter.slice_bytes = slice_bytes
            self._credit += window
            self._moved = time.monotonic()
            for transfer in self._transfers.values():
                self._say_finished(transfer)
            self._changed.notify_all()

    def grant(self, count: int) -> None:
        """The receiver lets so many more bytes come."""
        with self._changed:
            self._credit += count
            self._moved = time.monotonic()
            self._changed.notify_all()

    def take(self, stream: int) -> Slice[Transfer] | None:
        """The next frame for a stream, when there is one and credit for it; None when nothing is
        sent any more. Each is followed by `gave`."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.problem is not None
                    or (self._open and self._cutter and self._credit > 0 and self._is_due(stream))
                )
            )
            if self.problem is not None:
                return None
            part = self._cutter.cut()
            if self._taken:
                self._taken[stream] += 1
                self._changed.notify_all()
            # Below zero by one frame for each stream at most.
            self._credit -= part.length
            part.transfer.queued -= part.length
            part.transfer.sending += 1
            return part

    def gave(self, part: Slice[Transfer]) -> None:
        """A frame has been sent, or could not be."""
        transfer = part.transfer
        with self._changed:
            self._moved = time.monotonic()
            transfer.sending -= 1
            transfer.frames += 1
            if not transfer.sending:
                self._say_finished(transfer)
                self._settle(transfer)
                self._changed.notify_all()

    def ended(self, lease: int, problem: str | None, *, counts: bool = True) -> None:
        """The receiver says how a transfer ended, and whether a problem counts as a failure."""
        with self._changed:
            self._moved = time.monotonic()
            transfer = self._transfers.get(lease)
            if transfer is not None:
                self._end(transfer, problem, counts=counts)

    def stop(self, problem: str) -> bool:
        """Fails everything, now and later; False where it had stopped before."""
        with self._changed:
            if self.problem is not None:
                return False
            self.problem = problem
            for transfer in list(self._transfers.values()):
                self._end(transfer, problem)
            self._changed.notify_all()
            return True

    def stalled(self, seconds: float, arrived: float) -> bool:
        """Whether the receiver owes progress and has made none for so long, of which there is none
        to owe before `open`. `arrived`: when bytes came to its system last; a slow network takes
        longer than that over a frame, and moves all the while."""
        with self._changed:
            moved = max(self._moved, arrived)
            return self._open and self._busy() and time.monotonic() - moved > seconds

    def clings(self) -> bool:
        """Whether a frame has been on its way for long since its transfer was cancelled."""
        with self._changed:
            latest = time.monotonic() - _GRACE_SECONDS
            return any(
                transfer.sending and transfer.cancelled is not None and transfer.cancelled < latest
                for transfer in self._transfers.values()
            )

    def _is_due(self, stream: int) -> bool:
        """Whether a stream is not far ahead of another. What only says where pages lie is sent in
        no time: the first that wakes would take all there is, and its receiver copy it alone."""
        return not self._taken or self._taken[stream] < min(self._taken) + _AHEAD

    def _start_clock(self) -> None:
        """What is asked for while nothing else is has all its time from now."""
        if not self._busy():
            self._moved = time.monotonic()

    def _busy(self) -> bool:
        return bool(self._cutter) or any(
            transfer.sending or transfer.finishing for transfer in self._transfers.values()
        )

    def _say_finished(self, transfer: Transfer) -> None:
        under_way = transfer.queued or transfer.sending or transfer.over
        if self._open and transfer.finishing and not transfer.told and not under_way:
            transfer.told = True
            self._tell(Finish(transfer.lease, transfer.frames))

    def _end(self, transfer: Transfer, problem: str | None, *, counts: bool = True) -> None:
        if not transfer.over:
            transfer.over, transfer.problem = True, problem
            if transfer.queued:
                self._cutter.drop(transfer)
                transfer.queued = 0
            if problem is not None and counts:
                self._counters.add("failed")
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """Tells how a transfer ended, when no thread reads its pieces any more."""
        if not transfer.over or transfer.sending or transfer.settled:
            return
        ended = transfer.finishing or transfer.cancelled is not None
        if transfer.problem is None and not ended:
            return  # its owner may still call `finish`
        transfer.settled = True
        del self._transfers[transfer.lease]
        self._notifier.put(lambda: self._call(transfer))

    def _call(self, transfer: Transfer) -> None:
        with self._changed:
            cancelled, left = transfer.cancelled is not None, transfer.left
        if not cancelled:
            transfer.done(transfer.problem)
        elif left is not None:
            left()

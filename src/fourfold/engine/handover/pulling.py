"""Pages that never leave GPUs: the receiver copies them out of the sender's memory, which is of the
same GPU or of one that it can reach.

What is sent is only where pages lie and what their hashes are, 16 bytes a page. The receiver moves
them in one pass and compares the hashes of what it read, which shows too whether the sender has
used a page for something else meanwhile.

Shapes: L layers, P pages, R bytes of a record, S slots, J pages that move.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fourfold.engine.handover.landing import PromptLanding
from fourfold.engine.handover.pages import Prompt, page_format, runs
from fourfold.kernels.pages import hash_pages, move_pages
from fourfold.quadrants.kv_pages import CodedPages, KVPages
from fourfold.transport.format import PageFormat
from fourfold.transport.peer import DeviceMemory, DevicePages, Peer
from fourfold.transport.pieces import Part

_TICKET = np.dtype([("page", "<i8"), ("hash", "<i4", 2)])
"""What is sent of a page: its place in the sender's memory, and `hash_pages` of it."""

Attach = Callable[[DeviceMemory], Tensor]
"""Maps memory of another process: uint8 [size]."""


def may_pull(sender: Peer, receiver: Peer) -> bool:
    """Whether the receiver could copy pages out of the sender's memory, if it can be mapped."""
    return (
        sender.device is not None
        and receiver.device is not None
        and sender.host_id == receiver.host_id != ""
        and sender.pages == receiver.pages
    )


@dataclasses.dataclass(frozen=True)
class PagedMemory:
    """Pages as `move_pages` takes them: finished ones [L, P, R], and open ones [L, 2 S, R], the
    keys of all slots before the values."""

    form: PageFormat
    records_LPR: Tensor
    open_LPR: Tensor | None

    @classmethod
    def of(cls, pages: KVPages) -> PagedMemory:
        """An engine's own."""
        form = page_format(pages)
        if not isinstance(pages, CodedPages):
            return cls(form, pages.data.flatten(2).view(torch.uint8), None)
        opened = pages.open.flatten().view(torch.uint8)
        return cls(form, pages.records, _open_pages(form, pages, opened))

    @classmethod
    def attached(cls, pages: KVPages, theirs: DevicePages, attach: Attach) -> PagedMemory:
        """Another engine's that keeps pages as `pages` are, but in its own number."""
        form = page_format(pages)
        size = form.layers * theirs.pages * form.record_bytes
        records = attach(theirs.records)[:size].view(form.layers, theirs.pages, form.record_bytes)
        opened = None if theirs.open is None else _open_pages(form, pages, attach(theirs.open))
        return cls(form, records, opened)

    @property
    def parts(self) -> list[Part]:
        """Those that there are."""
        return [Part.PAGES] if self.open_LPR is None else [Part.PAGES, Part.OPEN]

    def part(self, part: Part) -> Tensor:
        """Finished pages, or open ones."""
        if part is Part.PAGES:
            return self.records_LPR
        assert self.open_LPR is not None
        return self.open_LPR

    def page_bytes(self, part: Part) -> int:
        """Of a page in one layer, finished or open."""
        return self.part(part)[0, 0].nbytes

    def open_of(self, slot: int) -> list[int]:
        """The open pages of a slot: its keys, its values."""
        assert self.open_LPR is not None
        return [slot, self.open_LPR.shape[1] // 2 + slot]


def _open_pages(form: PageFormat, pages: KVPages, memory: Tensor) -> Tensor:
    page_bytes = pages.shape.float_bytes // (2 * form.layers)
    room = memory.numel() // (form.layers * page_bytes) // 2 * 2
    return memory[: form.layers * room * page_bytes].view(form.layers, room, page_bytes)


class Tickets:
    """The sender's side: an `Outlet` of tickets in place of pages."""

    record_bytes = _TICKET.itemsize

    def __init__(self, memory: PagedMemory, stream: torch.cuda.Stream | None) -> None:
        self._memory, self._stream = memory, stream

    @property
    def pulled(self) -> dict[Part, int]:
        """Bytes that the ticket of a page, and those of the open pages, are for."""
        pages_of = {Part.PAGES: 1, Part.OPEN: 2}
        memory = self._memory
        return {part: pages_of[part] * memory.page_bytes(part) for part in memory.parts}

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        return self._of(Part.PAGES, layers, prompt.pages[first : first + count])

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        return self._of(Part.OPEN, layers, self._memory.open_of(prompt.slot))

    def _of(self, part: Part, layers: Sequence[int], pages: list[int]) -> list[list[memoryview]]:
        memory = self._memory.part(part)
        tickets = np.empty((len(layers), len(pages)), _TICKET)
        tickets["page"] = pages
        with torch.cuda.stream(self._stream):
            from_J = torch.tensor(pages, device=memory.device)
            hashes = [hash_pages(memory[run], from_J) for run in runs(layers)]
            tickets["hash"] = torch.cat(hashes).cpu().numpy()
        return [[of_layer.view(np.uint8).data] for of_layer in tickets]


class PullLanding(PromptLanding):
    """The receiver's side: tickets land on the host, and pages are copied as tickets come."""

    def __init__(
        self,
        mine: PagedMemory,
        theirs: PagedMemory,
        prompt: Prompt,
        found: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """To be made while the engine's stream is the current one."""
        super().__init__(mine.form, prompt, found)
        self._mine, self._theirs, self._stream = mine, theirs, stream
        self._ids = {Part.PAGES: prompt.pages[found : found + self.pages]}
        if self.open:
            self._ids[Part.OPEN] = mine.open_of(prompt.slot)
        self._tickets = {
            part: np.zeros((self.layers, len(ids)), _TICKET) for part, ids in self._ids.items()
        }
        self._lock = threading.Lock()
        # A step under way may still write to pages that belonged to a sample it knows.
        self._free: torch.cuda.Event | None = None
        if stream is not None:
            self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives no type
            self._free.record()

    def land(self) -> None:
        """Nothing is left to do."""

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        """Copies the pages of these tickets, and waits for that; returns their bytes. Raises
        `ValueError` where they are not what was promised."""
        count = 2 if part is Part.OPEN else count
        tickets = self._tickets[part][layer : layer + layers, first : first + count]
        ids = self._ids[part][first : first + count]
        source, target = (memory.part(part) for memory in (self._theirs, self._mine))
        pages = tickets["page"]
        if (pages != pages[0]).any() or pages.min() < 0 or pages.max() >= source.shape[1]:
            raise ValueError("tickets for pages that the sender does not have")
        with self._lock, torch.cuda.stream(self._stream):
            if self._free is not None:
                self._free.wait()
            from_J = torch.from_numpy(pages[0].copy()).to(target.device)
            to_J = torch.tensor(ids, device=target.device)
            of = slice(layer, layer + layers)
            read = move_pages(target[of], to_J, source[of], from_J).cpu().numpy()
        if not np.array_equal(read, tickets["hash"]):
            raise ValueError("pages of the sender changed while they were copied")
        return pages.size * self._mine.page_bytes(part)

    def _records(self, layer: int, first: int, count: int) -> list[memoryview]:
        return [self._tickets[Part.PAGES][layer, first : first + count].view(np.uint8).data]

    def _rows(self, layer: int) -> list[memoryview]:
        return [self._tickets[Part.OPEN][layer].view(np.uint8).data]

"""An engine's dealings with others: pages of prompts that it sends, and those that it receives.

Everything is called on the engine's thread; what the transport reports from its own threads goes
to the engine's inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fourfold.engine.handover.convert import ConvertedPages, tell_of_conversion
from fourfold.engine.handover.landing import HostLanding, PromptLanding
from fourfold.engine.handover.pages import HostPages, Outlet, Prompt, side_stream
from fourfold.engine.handover.pulling import Attach, PagedMemory, PullLanding, Tickets, may_pull
from fourfold.engine.handover.sending import Computing, Courier, Route, Sending
from fourfold.engine.handover.staged import StagedLanding, StagedPages
from fourfold.engine.messages import Granted, Stage
from fourfold.engine.progress import Reached
from fourfold.engine.scheduler import Work
from fourfold.engine.sequence import Sequence
from fourfold.kernels.device_memory import DeviceMemoryError
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages
from fourfold.transport.format import PageFormat
from fourfold.transport.node import Node
from fourfold.transport.peer import Peer

logger = logging.getLogger(__name__)


class Delivered(NamedTuple):
    """The receiver has a prompt's pages, or never will because of `error`."""

    request_id: int
    error: str | None


class Arrived(NamedTuple):
    """The pages of a prompt are here and are what was sent, or will not come because of `error`."""

    request_id: int
    error: str | None


class Lost(NamedTuple):
    """A peer has gone; nothing of it comes any more."""

    epoch: int


class Spoilt(NamedTuple):
    """Pages and the open rows of a slot that a prompt did not fill as it was sent."""

    pages: list[int]
    slot: int


class Left(NamedTuple):
    """Nobody reads or writes the pages of a part that has ended any more."""

    sequence: Sequence
    spoilt: Spoilt | None


class Handover:
    """The parts of requests that one engine shares with others."""

    def __init__(
        self,
        node: Node,
        pages: KVPages,
        post: Callable[[Delivered | Arrived | Lost | Left], None],
        attach: Attach,
    ) -> None:
        """`attach` maps memory of other processes on the pages' device."""
        self._node = node
        self._pages = pages
        self._attach = attach
        self._attached: dict[int, PagedMemory | None] = {}
        """Memory of peers by their epochs, which no two incarnations share; None for what cannot be
        read here. Kept while the peer has a link to here: mapping it takes milliseconds."""
        self._paged = PagedMemory.of(pages)
        self._stream = side_stream(pages)
        node.on_lost = lambda epoch: post(Lost(epoch))
        on_host = pages.device.type == "cpu"
        self._memory = HostPages(pages) if on_host else StagedPages(pages)
        self._converted: dict[PageFormat, ConvertedPages] = {}
        self._landings: dict[int, PromptLanding] = {}
        self._post = post
        self._courier = Courier()
        self._sendings: dict[int, Sending] = {}
        self._grants: dict[int, Granted] = {}

    def expect(self, sequence: Sequence) -> Granted:
        """Makes the pages of a prompt that was granted them ready to be filled."""
        request = sequence.request
        found = sequence.computed // PAGE_TOKENS
        assert request.peer is not None
        landing = self._landing(request.peer, _prompt(sequence), found)
        self._landings[request.request_id] = landing
        self._node.expect(
            request.request_id,
            request.peer.epoch,
            landing,
            lambda error: self._post(Arrived(request.request_id, error)),
        )
        pulls = isinstance(landing, PullLanding)
        return Granted(request_id=request.request_id, found=found, pulls=pulls)

    def detach(self, epoch: int) -> None:
        """Gives up what is mapped of a peer that has gone."""
        self._attached.pop(epoch, None)

    def land(self, request_id: int) -> None:
        """Enqueues what is left to do with pages that have come, which nobody writes any more."""
        self._landings[request_id].land()
        del self._landings[request_id]
        self._node.forget(request_id)

    def grant(self, message: Granted, sequence: Sequence) -> None:
        """The receiver of a prompt holds pages for it."""
        sending = self._sendings.get(message.request_id)
        if sending is None:  # not begun here
            self._grants[message.request_id] = message
        else:
            self._begin(sending, message, sequence)

    def launched(self, chunks: Iterable[Work], reached: Reached) -> None:
        """Chunks of prompts are being computed, and are in the pages of the first `reached()`
        layers. A receiver that computes on the same GPU gets them at the end of the step: to take
        pages while it lasts would hold it up."""
        elsewhere = [chunk for chunk in chunks if not self._shares_gpu(chunk.sequence)]
        if under_way := self._under_way(elsewhere):
            self._courier.follow(Computing(reached, under_way))

    def stored(self, layers: Iterable[int], chunks: Iterable[Work]) -> None:
        """Chunks of prompts are in the pages of these layers."""
        for sending, tokens in self._under_way(chunks):
            self._courier.advance(sending, layers, tokens)

    def computed(self, chunks: Iterable[Work]) -> None:
        """Chunks of prompts are in the pages of all layers."""
        self.stored(range(self._memory.format.layers), chunks)

    def let_go(self, sequence: Sequence) -> bool:
        """Ends what others have to do with a part's pages; waits for nobody. Returns whether no
        thread reads or writes them any more; else `Left` follows when that is so."""
        request_id = sequence.request.request_id
        self._grants.pop(request_id, None)
        if sequence.stage is Stage.DECODE:
            return self._let_go_of_landing(sequence)
        sending = self._sendings.pop(request_id, None)
        return sending is None or sending.cancel(lambda: self._post(Left(sequence, None)))

    def clear(self, spoilt: Spoilt) -> None:
        """Clears pages that did not come as they were sent: what came may be NaN, which would spoil
        the answers of their next owner even where it is masked."""
        with torch.cuda.stream(self._stream):
            self._paged.records_LPR[:, spoilt.pages] = 0
            if self._paged.open_LPR is not None:
                self._paged.open_LPR[:, self._paged.open_of(spoilt.slot)] = 0
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Ends its thread; transfers end with the node."""
        self._courier.close()

    def _let_go_of_landing(self, sequence: Sequence) -> bool:
        request_id, spoilt = sequence.request.request_id, None
        if self._landings.pop(request_id, None) is not None:
            came = sequence.pages[sequence.computed // PAGE_TOKENS :]
            spoilt = Spoilt(came, sequence.slot)
        left = self._node.forget(request_id, lambda: self._post(Left(sequence, spoilt)))
        if left and spoilt is not None:
            self.clear(spoilt)
        assert sequence.request.peer is not None
        epoch = sequence.request.peer.epoch
        if not self._node.linked_by(epoch):  # it may have died without one: nothing tells of it
            self.detach(epoch)
        return left

    def _under_way(self, chunks: Iterable[Work]) -> list[tuple[Sending, int]]:
        """Of chunks that others are to have: their sendings, and the tokens up to their ends."""
        return [
            (self._sending(chunk.sequence), chunk.start + chunk.length)
            for chunk in chunks
            if chunk.sequence.stage is Stage.PREFILL and chunk.sequence.slot >= 0
        ]

    def _shares_gpu(self, sequence: Sequence) -> bool:
        """Whether the other engine of a prompt takes pages out of the memory of the GPU that both
        compute on."""
        peer, me = sequence.request.peer, self._node.peer
        if peer is None or peer.device is None or me.device is None:
            return False
        same = peer.device.gpu == me.device.gpu
        return same and self._node.may_share and may_pull(me, peer)

    def _sending(self, sequence: Sequence) -> Sending:
        request_id = sequence.request.request_id
        sending = self._sendings.get(request_id)
        if sending is None:
            sending = Sending(
                _prompt(sequence),
                self._memory.format.layers,
                lambda error: self._post(Delivered(request_id, error)),
            )
            self._sendings[request_id] = sending
            if (grant := self._grants.pop(request_id, None)) is not None:
                self._begin(sending, grant, sequence)
        return sending

    def _begin(self, sending: Sending, grant: Granted, sequence: Sequence) -> None:
        try:
            route = self._route(grant, sequence)
        except Exception as error:  # it concerns this prompt alone
            logger.exception("pages of a prompt cannot be sent")
            sending.fail(f"{type(error).__name__}: {error}")
            return
        sending.begin(route)
        self._courier.advance(sending)

    def _route(self, grant: Granted, sequence: Sequence) -> Route:
        request_id = sequence.request.request_id
        peer = sequence.request.peer
        assert peer is not None
        assert peer.pages is not None
        outlet = self._outlet(peer.name, peer.pages, pulls=grant.pulls)
        transfer = self._node.link(peer).begin(
            request_id,
            lambda error: self._post(Delivered(request_id, error)),
            outlet.pulled if isinstance(outlet, Tickets) else None,
        )
        return Route(transfer, outlet, peer.pages, grant.found)

    def _outlet(self, peer: str, theirs: PageFormat, *, pulls: bool) -> Outlet:
        if pulls:
            return Tickets(self._paged, self._stream)
        if theirs == self._memory.format:
            return self._memory
        if theirs not in self._converted:
            self._converted[theirs] = ConvertedPages(self._pages, theirs)
            tell_of_conversion(peer, self._memory.format, theirs)
        return self._converted[theirs]

    def _landing(self, peer: Peer, prompt: Prompt, found: int) -> PromptLanding:
        if (theirs := self._memory_of(peer)) is not None:
            return PullLanding(self._paged, theirs, prompt, found, self._stream)
        if isinstance(self._memory, HostPages):
            return HostLanding(self._memory, prompt, found)
        return StagedLanding(self._memory, prompt, found)

    def _memory_of(self, peer: Peer) -> PagedMemory | None:
        """A peer's pages, if they can be read here."""
        if peer.epoch in self._attached:
            return self._attached[peer.epoch]
        theirs = None
        me = self._node.peer
        if self._node.may_share and peer.device and me.device and may_pull(peer, me):
            where = "its GPU" if peer.device.gpu == me.device.gpu else f"GPU {peer.device.gpu}"
            try:
                theirs = PagedMemory.attached(self._pages, peer.device, self._attach)
                logger.info("takes pages of %s out of the memory of %s", peer.name, where)
            except DeviceMemoryError as error:
                logger.warning(
                    "pages of %s, on %s, go through the host: %s", peer.name, where, error
                )
        self._attached[peer.epoch] = theirs
        return theirs


def _prompt(sequence: Sequence) -> Prompt:
    return Prompt(sequence.pages, sequence.slot, sequence.given)

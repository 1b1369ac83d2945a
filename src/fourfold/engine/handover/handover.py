"""An engine's dealings with others: pages of prompts that it sends, and those that it receives.

Everything is called on the engine's thread; what the transport reports from its own threads goes
to the engine's inbox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fourfold.engine.handover.convert import ConvertedPages
from fourfold.engine.handover.device import DeviceLanding, DevicePages
from fourfold.engine.handover.landing import HostLanding, PromptLanding
from fourfold.engine.handover.pages import HostPages, Outlet, Prompt
from fourfold.engine.handover.sending import Courier, Route, Sending
from fourfold.engine.messages import Granted, Stage
from fourfold.engine.scheduler import Work
from fourfold.engine.sequence import Sequence
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages
from fourfold.transport.format import PageFormat
from fourfold.transport.node import Node


class Delivered(NamedTuple):
    """The receiver has a prompt's pages, or never will because of `error`."""

    request_id: int
    error: str | None


class Arrived(NamedTuple):
    """The pages of a prompt are here and are what was sent, or will not come because of `error`."""

    request_id: int
    error: str | None


class Handover:
    """The parts of requests that one engine shares with others."""

    def __init__(
        self, node: Node, pages: KVPages, post: Callable[[Delivered | Arrived], None]
    ) -> None:
        self._node = node
        self._pages = pages
        on_host = pages.device.type == "cpu"
        self._memory = HostPages(pages) if on_host else DevicePages(pages)
        self._landings: dict[int, PromptLanding] = {}
        self._post = post
        self._courier = Courier()
        self._sendings: dict[int, Sending] = {}
        self._grants: dict[int, Granted] = {}

    def expect(self, sequence: Sequence) -> Granted:
        """Makes the pages of a prompt that was granted them ready to be filled."""
        request = sequence.request
        found = sequence.computed // PAGE_TOKENS
        memory, prompt = self._memory, _prompt(sequence)
        landing: PromptLanding
        if isinstance(memory, HostPages):
            landing = HostLanding(memory, prompt, found)
        else:
            landing = DeviceLanding(memory, prompt, found)
        self._landings[request.request_id] = landing
        assert request.peer is not None
        self._node.expect(
            request.request_id,
            request.peer.epoch,
            landing,
            lambda error: self._post(Arrived(request.request_id, error)),
        )
        return Granted(request_id=request.request_id, found=found)

    def land(self, request_id: int) -> None:
        """Enqueues what is left to do with pages that have come, which nobody writes any more."""
        self._landings.pop(request_id).land()
        self._node.forget(request_id)

    def grant(self, message: Granted, sequence: Sequence) -> None:
        """The receiver of a prompt holds pages for it."""
        sending = self._sendings.get(message.request_id)
        if sending is None:  # not begun here
            self._grants[message.request_id] = message
        else:
            self._begin(sending, message, sequence)

    def stored(self, layers: Iterable[int], chunks: Iterable[Work]) -> None:
        """Chunks of prompts are in the pages of these layers."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.stage is Stage.PREFILL and sequence.slot >= 0:
                sending = self._sending(sequence)
                sending.stored(layers, chunk.start + chunk.length)
                self._courier.advance(sending)

    def let_go(self, sequence: Sequence) -> None:
        """Returns when nothing of others reads or writes a sample's pages."""
        request_id = sequence.request.request_id
        self._grants.pop(request_id, None)
        if sequence.stage is Stage.DECODE:
            self._node.forget(request_id)
            self._landings.pop(request_id, None)
        elif (sending := self._sendings.pop(request_id, None)) is not None:
            sending.cancel()

    def close(self) -> None:
        """Ends its thread; transfers end with the node."""
        self._courier.close()

    def _sending(self, sequence: Sequence) -> Sending:
        request_id = sequence.request.request_id
        sending = self._sendings.get(request_id)
        if sending is None:
            sending = Sending(_prompt(sequence), self._memory.format.layers)
            self._sendings[request_id] = sending
            if (grant := self._grants.pop(request_id, None)) is not None:
                self._begin(sending, grant, sequence)
        return sending

    def _begin(self, sending: Sending, grant: Granted, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        peer = sequence.request.peer
        assert peer is not None
        assert peer.pages is not None
        transfer = self._node.link(peer).begin(
            request_id, lambda error: self._post(Delivered(request_id, error))
        )
        sending.begin(Route(transfer, self._outlet(peer.pages), peer.pages, grant.found))
        self._courier.advance(sending)

    def _outlet(self, theirs: PageFormat) -> Outlet:
        if theirs == self._memory.format:
            return self._memory
        return ConvertedPages(self._pages, theirs)


def _prompt(sequence: Sequence) -> Prompt:
    return Prompt(sequence.pages, sequence.slot, sequence.given)

"""Sends parts of requests to workers: the fleet's side of every `Flight`."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from fourfold.engine.messages import Stage, Submit, TokenOutput
from fourfold.engine.page_pool import PageKey
from fourfold.gateway.fleet.flight import Flight, Part, ToWorker
from fourfold.gateway.fleet.members import Burden, Member
from fourfold.gateway.fleet.prefixes import PrefixIndex, page_keys
from fourfold.gateway.fleet.routing import (
    Asked,
    Route,
    WorkerView,
    choose_route,
    lacks_a_role,
    pages_wanted,
)

logger = logging.getLogger(__name__)

_AVOIDED_SECONDS = 30.0
"""For which two workers are not cut between after their pages could not be moved."""
_PROMPT_RATE, _TOKEN_RATE = 2000.0, 100.0
"""Tokens per second, until any worker's were measured."""


class Counts(msgspec.Struct):
    """What became of requests since the start."""

    whole: int = 0
    """Parts that one worker computed."""
    cut: int = 0
    """Parts that two did."""
    lost: int = 0
    """Parts that lost a worker and went on elsewhere."""
    unmoved: int = 0
    """Parts whose pages could not be moved, and that were tried again."""


class Dispatcher:
    """Implements `Post` over the workers there are."""

    def __init__(
        self,
        members: Mapping[int, Member],
        deliver: Callable[[TokenOutput], None],
        *,
        prefix_cache: bool,
    ) -> None:
        self.counts = Counts()
        self.prefixes = PrefixIndex()
        self._members = members
        self._deliver = deliver
        self._prefix_cache = prefix_cache
        self._flights: dict[int, Flight] = {}
        self._keys: dict[int, list[PageKey]] = {}
        self._avoided: dict[Route, float] = {}
        self._warned: set[str] = set()
        # Drawn, so that pages on their way for an earlier gateway are never taken for ours.
        self._number = secrets.randbits(62)

    def flight(self, part: int) -> Flight | None:
        """Whose part this is, unless it is over."""
        return self._flights.get(part)

    def open(self, flight: Flight, asked: Submit) -> Part | None:
        """As `Post.open`."""
        members = [member for member in self._members.values() if member.takes_requests]
        if not members:
            return None
        # One alone has no prefix to be chosen for.
        keys = self._page_keys(asked, members[0]) if len(members) > 1 else []
        question = Asked(
            tokens=len(asked.prompt_ids) + len(asked.generated),
            prompt_tokens=len(asked.prompt_ids),
            max_tokens=asked.sampling.max_tokens,
            n=asked.n,
            uncut=asked.sampling.prompt_logprobs,
            found={m.number: self.prefixes.found(m.number, keys) for m in members} if keys else {},
        )
        views = {view.number: view for view in self._views(members)}
        route = choose_route(question, list(views.values()), self._avoid_now())
        if route is None:
            return None
        if (lacking := lacks_a_role(list(views.values()))) is not None:
            self._warn_once(f"no worker takes {lacking}; the others compute whole requests")
        self._number += 1
        live = set(range(asked.index, asked.index + asked.n))
        part = Part(self._number, asked, route, live)
        self._flights[part.number] = flight
        self._keys[part.number] = keys
        self._burden(part, question, views)
        self._submit(part)
        return part

    def began(self, part: Part) -> None:
        """As `Post.began`."""
        for worker in set(part.route):
            if (member := self._members.get(worker)) is not None:
                member.began(part.number)

    def hand_over(self, part: Part) -> None:
        """As `Post.hand_over`."""
        if not part.route.whole:
            self._drop(part.route.prefill, part)

    def close(self, part: Part, tokens: Sequence[int]) -> None:
        """As `Post.close`."""
        del self._flights[part.number]
        keys = self._keys.pop(part.number)
        for worker in set(part.route):
            self._drop(worker, part)
        member = self._members.get(part.route.decode)
        if tokens and keys and member is not None and member.ready is not None:
            # What follows in a conversation begins with the prompt and this answer, of which the
            # last token was never computed.
            text = [*part.asked.prompt_ids, *tokens[:-1]]
            keys = page_keys(text, member.ready.pages.page_tokens, keys)
            self.prefixes.add(member.number, keys, member.stats.pages_total)

    def send(self, worker: int, message: ToWorker) -> None:
        """As `Post.send`."""
        if (member := self._members.get(worker)) is not None:
            member.send(message)

    def deliver(self, output: TokenOutput) -> None:
        """As `Post.deliver`."""
        self._deliver(output)

    def avoid(self, route: Route, why: str) -> None:
        """As `Post.avoid`."""
        self.counts.unmoved += 1
        names = [self._members[worker].name for worker in route if worker in self._members]
        logger.warning("pages could not be moved between %s: %s", " and ".join(names), why)
        self._avoided[route] = time.monotonic() + _AVOIDED_SECONDS

    def lost(self, part: Part, why: str) -> None:
        """As `Post.lost`."""
        self.counts.lost += 1
        logger.debug("part %d is given up: %s", part.number, why)

    def forget(self, worker: int) -> None:
        """A worker has gone."""
        self.prefixes.forget(worker)
        self._avoided = {
            route: until for route, until in self._avoided.items() if worker not in route
        }

    def _submit(self, part: Part) -> None:
        submit = msgspec.structs.replace(part.asked, request_id=part.number)
        prefill, decode = (self._members[worker] for worker in part.route)
        if part.route.whole:
            self.counts.whole += 1
            decode.send(submit)
            return
        assert prefill.ready is not None
        assert decode.ready is not None
        self.counts.cut += 1
        there, here = decode.ready.peer, prefill.ready.peer
        prefill.send(msgspec.structs.replace(submit, stage=Stage.PREFILL, peer=there))
        decode.send(msgspec.structs.replace(submit, stage=Stage.DECODE, peer=here))

    def _burden(self, part: Part, asked: Asked, views: Mapping[int, WorkerView]) -> None:
        """Notes what a part will ask of its workers, and what they will have of its text then."""
        keys = self._keys[part.number]
        for worker in set(part.route):
            view, member = views[worker], self._members[worker]
            computes = worker == part.route.prefill
            known = asked.found.get(worker, 0) * view.page_tokens
            member.take(
                part.number,
                Burden(
                    samples=asked.n if worker == part.route.decode else 0,
                    pages=pages_wanted(asked, view),
                    tokens=max(1, asked.tokens - known) if computes else 0,
                ),
            )
            self.prefixes.add(worker, keys, member.stats.pages_total)

    def _drop(self, worker: int, part: Part) -> None:
        if (member := self._members.get(worker)) is not None:
            member.drop(part.number)

    def _views(self, members: Sequence[Member]) -> list[WorkerView]:
        prompt_rates = [member.prompt_rate for member in members if member.prompt_rate]
        token_rates = [member.token_rate for member in members if member.token_rate]
        # One that was not measured yet is taken for as fast as any: it will be measured then.
        prompt_rate = max(prompt_rates, default=_PROMPT_RATE)
        token_rate = max(token_rates, default=_TOKEN_RATE)
        return [
            WorkerView(
                number=member.number,
                role=member.role,
                max_context=member.ready.max_context,
                page_tokens=member.ready.pages.page_tokens,
                pages_free=member.pages_free,
                samples=member.burden.samples,
                queued_tokens=member.burden.tokens,
                prompt_rate=member.prompt_rate or prompt_rate,
                token_rate=member.token_rate or token_rate,
            )
            for member in members
            if member.ready is not None
        ]

    def _page_keys(self, asked: Submit, member: Member) -> list[PageKey]:
        if not self._prefix_cache or member.ready is None:
            return []
        # The last token is always computed: what follows it is sampled there.
        text = [*asked.prompt_ids, *asked.generated][:-1]
        return page_keys(text, member.ready.pages.page_tokens)

    def _avoid_now(self) -> Collection[Route]:
        if self._avoided:
            now = time.monotonic()
            self._avoided = {r: until for r, until in self._avoided.items() if until > now}
        return self._avoided

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)

"""Watches what a fleet and its workers say to each other, and tells the faults where they are."""

from __future__ import annotations

import time
from typing import Any

from fourfold.engine.channel import FromEngine, Leaving, News, Progress, ToEngine
from fourfold.engine.messages import Continue, Granted, Moved, Stage, Submit
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.gateway.fleet.members import Member
from tests.cpu.chaos.faults import Faults
from tests.cpu.chaos.story import Story


class Spy:
    """Puts itself between a fleet and its workers."""

    def __init__(self, fleet: Fleet, faults: Faults, story: Story) -> None:
        self._fleet, self._faults, self._story = fleet, faults, story
        self._heard, self._ended, self._add = fleet.heard, fleet.ended, fleet.add
        patched: Any = fleet
        patched.heard, patched.ended, patched.add = self._hear, self._end, self._watch_new
        for member in fleet.members:
            self._watch(member)

    def frame(self, name: str) -> None:
        """A frame of pages is on its way to a worker."""
        member = next((each for each in self._fleet.members if each.name == name), None)
        self._faults.come_to("between pages", {"decode": member})

    def _watch_new(self, *args: Any, **options: Any) -> Member:
        member = self._add(*args, **options)
        self._watch(member)
        return member

    def _watch(self, member: Member) -> None:
        send = member.send

        def watched(message: ToEngine) -> None:
            send(message)
            match message:
                case Submit(stage=Stage.DECODE):
                    self._come_to("submitted", message.request_id)
                case Continue():
                    self._come_to("continued", message.request_id)

        patched: Any = member
        patched.send = watched

    def _hear(self, member: Member, message: FromEngine) -> None:
        self._heard(member, message)
        match message:
            case News():
                self._take(member, message)
            case Progress():
                self._faults.come_to("loading", {"prefill": member, "decode": member})
            case Leaving():
                self._story.tell(f"{member.name} leaves")
                self._faults.come_to("leaving", {"prefill": member, "decode": member})

    def _take(self, member: Member, news: News) -> None:
        for told in news.handover:
            match told:
                case Granted():
                    self._come_to("granted", told.request_id)
                case Moved():
                    if told.error is not None:
                        self._story.tell(f"{member.name} moved nothing: {told.error}")
                    self._come_to("moved", told.request_id)
        for output in news.outputs:
            flight = self._fleet._dispatcher.flight(output.request_id)
            if flight is None:
                continue
            part = flight.parts.get(output.request_id)
            if part is not None and not part.route.whole and member.number == part.route.prefill:
                self._come_to("first token", output.request_id)
            else:
                self._come_to("decoding", output.request_id)

    def _come_to(self, point: str, number: int) -> None:
        flight = self._fleet._dispatcher.flight(number)
        part = None if flight is None else flight.parts.get(number)
        members: dict[str, Member | None] = {}
        if part is not None:
            known = {member.number: member for member in self._fleet.members}
            members = {
                "prefill": known.get(part.route.prefill),
                "decode": known.get(part.route.decode),
            }
        self._faults.come_to(point, members)

    def _end(self, member: Member, why: str) -> None:
        struck = self._faults.struck.pop(member.number, None)
        if struck is not None:
            when, how = struck
            self._story.detections.append((time.monotonic() - when, how))
        self._story.tell(f"{member.name} is gone: {why}")
        self._ended(member, why)

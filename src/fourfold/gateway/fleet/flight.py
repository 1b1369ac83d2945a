"""One accepted request on its way through workers that may die.

A flight knows no socket and no clock: events come in as calls, and what follows from them goes out
through a `Post`. It cuts the request into *parts*, each with a number of its own that is never used
again: the whole request at first, later one for each sample that lost its worker and goes on
elsewhere, after the tokens already delivered. What is heard of a part that was given up is not
listened to, so no token is lost or repeated, and every sample ends once.

A part may be cut in two (`Route`): its prompt at one worker, its answer at another, under the same
number. It depends on the prefilling one until the first token is known and the pages have moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    Granted,
    Moved,
    Submit,
    TokenOutput,
)
from fourfold.gateway.fleet.routing import Route

ToWorker = Submit | Abort | Granted | Continue


@dataclasses.dataclass(eq=False)
class Part:
    """What workers were told to compute of a request; `live` are its samples under way."""

    number: int
    asked: Submit
    route: Route
    live: set[int]
    begun: bool = False
    """The first of its tokens has come."""
    granted: bool = False
    moved: bool = False
    """Its prompt's pages are where the answer is computed."""

    @property
    def waits(self) -> bool:
        """Whether nothing but its prompt's pages is missing."""
        return self.begun and self.granted and not self.moved and not self.route.whole

    def needs(self, worker: int) -> bool:
        """Whether the part is lost with this worker."""
        if worker == self.route.decode:
            return True
        return worker == self.route.prefill and not (self.begun and self.moved)


class Post(Protocol):
    """What a flight asks of the fleet."""

    def open(self, flight: Flight, asked: Submit) -> Part | None:
        """Chooses who computes a part, submits it to them under a fresh number, and hands what they
        say to the flight. None where nobody can now. Samples of the flight may be aborted
        meanwhile."""

    def began(self, part: Part) -> None:
        """The part's prompt is computed."""

    def close(self, part: Part, tokens: Sequence[int]) -> None:
        """The part is over; its text ended with `tokens` where that is known."""

    def hand_over(self, part: Part) -> None:
        """The part depends on the worker that computes its answer alone from now on."""

    def lost(self, part: Part, why: str) -> None:
        """The part was given up; its samples go on elsewhere."""

    def send(self, worker: int, message: ToWorker) -> None:
        """Nothing happens where the worker has gone."""

    def deliver(self, output: TokenOutput) -> None:
        """News for whoever asked."""

    def avoid(self, route: Route, why: str) -> None:
        """Pages could not be moved between these two."""


@dataclasses.dataclass
class _Sample:
    """What was delivered of one sample, and how often in a row it lost its worker since."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    losses: int = 0


class Flight:
    """Follows one request from its admission to the end of its last sample."""

    def __init__(self, request: Submit, post: Post, max_attempts: int) -> None:
        self.request = request
        self.parts: dict[int, Part] = {}
        self.rests = False
        """Whether what waits lost its workers more than once in a row, and is to be tried again
        soon: where many workers die together, each would cost it an attempt within an instant."""
        self._post = post
        self._max_attempts = max_attempts
        self._samples = [_Sample() for _ in range(request.n)]
        self._parked: list[tuple[int, ...]] = []

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.ended for sample in self._samples)

    @property
    def parked(self) -> bool:
        """Whether some of it waits for a worker."""
        waiting = (index for indices in self._parked for index in indices)
        return any(not self._samples[index].ended for index in waiting)

    def begin(self) -> None:
        """Sends the request out."""
        self._dispatch(tuple(range(self.request.n)))

    def try_again(self) -> None:
        """Sends out what waits for a worker, where there is one now."""
        self.rests = False
        parked, self._parked = self._parked, []
        for indices in parked:
            self._dispatch(indices)

    def hear(self, number: int, worker: int, output: TokenOutput) -> None:
        """A worker's news of one sample."""
        part = self.parts.get(number)
        if part is None or not _to_be_heard(part, worker, output):
            return
        if output.finish is FinishReason.FAILED:
            self._fail(output.error or "it gave no reason")
            return
        if output.finish is FinishReason.CANCELLED:
            self.lose(part, "its worker gave it up")
            return
        self._take(part, output)

    def granted(self, worker: int, message: Granted) -> None:
        """The decoding worker of a part holds pages for its prompt."""
        part = self.parts.get(message.request_id)
        if part is None or part.granted or worker != part.route.decode or part.route.whole:
            return
        part.granted = True
        if part.needs(part.route.prefill):
            self._post.send(part.route.prefill, message)

    def moved(self, worker: int, message: Moved) -> None:
        """A prompt's pages have moved, or will not."""
        part = self.parts.get(message.request_id)
        if part is None or part.route.whole or worker not in part.route:
            return
        if part.moved and (message.error is None or (worker == part.route.prefill and part.begun)):
            # The decoding worker, who has them, knows better. But whose pages did not leave has
            # given the part up, perhaps before its first token was said.
            return
        if message.error is not None:
            self._post.avoid(part.route, message.error)
            self.lose(part, f"its pages could not be moved: {message.error}")
            return
        part.moved = True
        self._note_progress(part)

    def lost(self, worker: int, why: str, *, blame: bool = True) -> None:
        """A worker has gone. Without `blame` that was to be expected, and does not count."""
        for part in list(self.parts.values()):
            if part.needs(worker):
                self.lose(part, why, blame=blame)

    def lose(self, part: Part, why: str, *, blame: bool = True) -> None:
        """Gives a part up and sends its samples elsewhere."""
        if part.number not in self.parts:
            return
        self._close(part, abort=FinishReason.CANCELLED)
        self._post.lost(part, why)
        live = sorted(part.live)
        untouched = not any(sample.tokens or sample.ended for sample in self._samples)
        if untouched and len(live) == self.request.n:
            groups = [tuple(live)]
        else:
            groups = [(index,) for index in live]
        for index in live:
            self._samples[index].losses += blame
        if any(self._samples[index].losses >= self._max_attempts for index in live):
            self._fail(f"it was tried {self._max_attempts} times in a row; at last, {why}")
            return
        if any(self._samples[index].losses > 1 for index in live):
            self.rests = True
            self._parked += groups
            return
        for indices in groups:
            self._dispatch(indices)

    def abort(self, message: Abort) -> None:
        """Ends one sample, or all, as whoever asked wants it; nothing more is said of them."""
        indices = range(self.request.n) if message.index is None else (message.index,)
        for index in indices:
            self._samples[index].ended = True
        for part in list(self.parts.values()):
            self._end_in(part, indices, message.reason)

    def _dispatch(self, indices: Sequence[int]) -> None:
        indices = tuple(index for index in indices if not self._samples[index].ended)
        if not indices:
            return
        asked = self._asked(indices)
        part = self._post.open(self, asked)
        if part is None:
            self._parked.append(indices)
            return
        self.parts[part.number] = part
        # Before the request was sent out, or while it was.
        ended = [index for index in part.live if self._samples[index].ended]
        self._end_in(part, ended, FinishReason.CANCELLED)

    def _asked(self, indices: Sequence[int]) -> Submit:
        """What is still to be computed of some samples; several only if nothing came of any."""
        request, tokens = self.request, self._samples[indices[0]].tokens
        if len(indices) > 1:
            return request
        sampling = request.sampling
        # They came with the first token of the first sample.
        if sampling.prompt_logprobs and any(sample.tokens for sample in self._samples):
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=False)
        return msgspec.structs.replace(
            request, n=1, index=indices[0], generated=tuple(tokens), sampling=sampling
        )

    def _take(self, part: Part, output: TokenOutput) -> None:
        """Delivers news that is right and in order."""
        sample, first = self._samples[output.index], not part.begun
        fresh = not sample.tokens
        if output.token is not None:
            sample.tokens.append(output.token)
            sample.losses = 0
        if output.finish is not None:
            sample.ended = True
            part.live.remove(output.index)
        self._post.deliver(
            msgspec.structs.replace(
                output,
                request_id=self.request.request_id,
                prompt_logprobs=output.prompt_logprobs if fresh else None,
                cached_tokens=output.cached_tokens if fresh else 0,
            )
        )
        if first:
            part.begun = True
            self._post.began(part)
        if not part.live:
            # After a first token that is the last, the decoding worker waits for what never comes.
            waits = first and not part.route.whole
            self._close(part, abort=FinishReason.CANCELLED if waits else None)
            return
        if first and not part.route.whole:
            assert output.token is not None
            told = Continue(request_id=part.number, token=output.token, finish=output.finish)
            self._post.send(part.route.decode, told)
            self._note_progress(part)

    def _end_in(self, part: Part, indices: Iterable[int], reason: FinishReason) -> None:
        """Ends those of some samples that a part computes, and the part with the last of them."""
        gone = part.live.intersection(indices)
        part.live -= gone
        if not part.live:
            self._close(part, abort=reason)
            return
        for index in gone:
            message = Abort(request_id=part.number, index=index, reason=reason)
            self._post.send(part.route.decode, message)
        if part.asked.index in gone and part.needs(part.route.prefill) and not part.route.whole:
            # The others can share its prompt no more: the decoding worker computes it for them.
            self._post.send(part.route.prefill, Abort(request_id=part.number))
            part.begun = part.moved = True
            self._note_progress(part)

    def _note_progress(self, part: Part) -> None:
        if part.begun and part.moved:
            self._post.hand_over(part)

    def _close(self, part: Part, abort: FinishReason | None) -> None:
        """Forgets a part, and has workers forget it that may hold some of it still."""
        del self.parts[part.number]
        reason = abort or FinishReason.CANCELLED
        unmoved = not part.route.whole and part.needs(part.route.prefill)
        if abort is not None or unmoved:
            message = Abort(request_id=part.number, reason=reason)
            self._post.send(part.route.decode, message)
            if unmoved:
                self._post.send(part.route.prefill, message)
        index = part.asked.index
        ended_here = abort is None and part.asked.n == 1
        self._post.close(part, self._samples[index].tokens if ended_here else ())

    def _fail(self, error: str) -> None:
        """Ends everything with an error: a request of which one sample failed has failed."""
        for part in list(self.parts.values()):
            self._close(part, abort=FinishReason.CANCELLED)
        self._parked.clear()
        for index, sample in enumerate(self._samples):
            if not sample.ended:
                sample.ended = True
                self._post.deliver(
                    TokenOutput(
                        request_id=self.request.request_id,
                        index=index,
                        finish=FinishReason.FAILED,
                        error=error,
                    )
                )


def _to_be_heard(part: Part, worker: int, output: TokenOutput) -> bool:
    """Whether this is for that worker to say now, of a sample under way."""
    if output.index not in part.live or worker not in part.route:
        return False
    if part.route.whole or output.finish in (FinishReason.FAILED, FinishReason.CANCELLED):
        return part.needs(worker)
    # The prefilling worker says the first token of all, the other one everything after it.
    return part.begun == (worker == part.route.decode) and output.token is not None

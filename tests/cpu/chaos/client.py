"""One request as a client sees it."""

from __future__ import annotations

import math
import time

from fourfold.errors import DeadlineError, DrainingError, FourfoldError, OverloadedError
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import Delta, Generation, GenerationOptions
from tests.cpu.chaos.oracle import Answer, Heard
from tests.cpu.chaos.questions import Question
from tests.cpu.chaos.story import Story


class Client:
    """Asks one question and follows the answer to its end."""

    def __init__(self, gateway: Gateway, question: Question, story: Story, number: int) -> None:
        self._gateway, self._question, self._story = gateway, question, story
        self._name = f"request {number}"
        self._generation: Generation | None = None
        self._left = False
        self._samples = [Heard() for _ in range(question.n)]

    def leave(self) -> None:
        """Goes away without the rest of the answer."""
        if self._generation is not None:
            self._left = True
            self._generation.cancel()

    async def ask(self) -> Answer:
        """Returns when the request has ended, and has said in the story how; what came of it."""
        question = self._question
        options = GenerationOptions(
            sampling=question.sampling,
            max_tokens=question.sampling.max_tokens,
            n=question.n,
            ignore_eos=True,
        )
        longest, heard = 0.0, time.monotonic()
        try:
            self._generation = await self._gateway.complete(question.prompt, options)
            async for delta in self._generation:
                now = time.monotonic()
                longest, heard = max(longest, now - heard), now
                self._take(delta)
        except FourfoldError as error:
            self._end_with(error)
            return Answer(self._name, question, self._samples, whole=False)
        self._story.requests["answered"] += 1
        self._story.recoveries.append((longest, f" ({self._name})"))
        self._check_ends()
        return Answer(self._name, question, self._samples, whole=True)

    def _take(self, delta: Delta) -> None:
        heard = self._samples[delta.index]
        heard.text += delta.text
        heard.tokens += [token.token for token in delta.tokens]
        heard.logprobs += [math.nan if t.logprob is None else t.logprob for t in delta.tokens]
        heard.finished += delta.finish is not None

    def _end_with(self, error: FourfoldError) -> None:
        story = self._story
        match error:
            case _ if self._left:
                story.requests["left by their clients"] += 1
            case DrainingError() | OverloadedError():
                story.requests["refused"] += 1
            case DeadlineError():
                story.requests["out of time"] += 1
                story.violate("hung", f"{self._name}: {error}")
            case _:
                story.requests["failed"] += 1
                story.causes[f"{type(error).__name__}: {error}"] += 1
                story.tell(f"{self._name} failed: {error}")

    def _check_ends(self) -> None:
        for index, heard in enumerate(self._samples):
            if heard.finished != 1:
                self._story.violate(
                    "wrong",
                    f"{self._name}, sample {index} of {len(self._samples)} ended "
                    f"{heard.finished} times",
                )

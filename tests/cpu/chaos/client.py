"""One request as a client sees it, held against the answer that is known."""

from __future__ import annotations

import time

from fourfold.errors import DeadlineError, DrainingError, FourfoldError, OverloadedError
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import Delta, Generation, GenerationOptions
from tests.cpu.chaos.oracle import Question
from tests.cpu.chaos.story import Story


class Client:
    """Asks one question and follows the answer to its end."""

    def __init__(self, gateway: Gateway, question: Question, story: Story, number: int) -> None:
        self._gateway, self._question, self._story = gateway, question, story
        self._name = f"request {number}"
        self._generation: Generation | None = None
        self._left = False
        self._texts = [""] * question.n
        self._tokens: list[list[int]] = [[] for _ in range(question.n)]
        self._finished = [0] * question.n

    def leave(self) -> None:
        """Goes away without the rest of the answer."""
        if self._generation is not None:
            self._left = True
            self._generation.cancel()

    async def ask(self) -> None:
        """Returns when the request has ended, and has said in the story how."""
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
            self._check(whole=False)
            self._end_with(error)
        else:
            self._check(whole=True)
            self._story.requests["answered"] += 1
            self._story.recoveries.append((longest, f" ({self._name})"))

    def _take(self, delta: Delta) -> None:
        self._texts[delta.index] += delta.text
        self._tokens[delta.index] += [token.token for token in delta.tokens]
        self._finished[delta.index] += delta.finish is not None

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

    def _check(self, *, whole: bool) -> None:
        """Nothing that came is wrong, and everything came where the request was answered."""
        question = self._question
        for index in range(question.n):
            # What ended early may end in half a character, or before a token whose text was held.
            tokens, text = question.tokens[index], question.texts[index]
            if not whole:
                tokens, text = tokens[: len(self._tokens[index])], text[: len(self._texts[index])]
            if tuple(self._tokens[index]) != tokens or self._texts[index] != text:
                self._story.violate(
                    "wrong",
                    f"{self._name}, sample {index} of {question.n}: {self._tokens[index]} came, "
                    f"{list(tokens)} is right",
                )
            if whole and self._finished[index] != 1:
                self._story.violate(
                    "wrong", f"{self._name}, sample {index} ended {self._finished[index]} times"
                )

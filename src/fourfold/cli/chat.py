"""`fourfold chat`: talk to a model in the terminal.

Ctrl-C stops a reply and keeps what was said of it; at the prompt, it or Ctrl-D leaves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from typing import TYPE_CHECKING

from fourfold.cli.options import ModelOptions, start_model
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import SamplingParams
from fourfold.errors import RequestError, RequestFailedError
from fourfold.gateway.config import GatewayLimits

if TYPE_CHECKING:
    from fourfold.gateway.gateway import Gateway
    from fourfold.gateway.generation import GenerationOptions

_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops a reply."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Talks to a model in the terminal; /reset starts over, Ctrl-C stops a reply."""

    model: ModelOptions = ModelOptions()
    system: str | None = None
    """A system message to begin every conversation with."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens with this much probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes repeated tokens less likely."""
    max_tokens: int = 1024
    """Longest reply, shortened where the context leaves less."""
    seed: int | None = None
    """Makes replies repeatable."""
    engine: EngineConfig = EngineConfig(max_running=1)


def run(options: Options) -> int:
    from fourfold.gateway.budget import check_options

    limits = GatewayLimits(request_timeout=math.inf)  # Ctrl-C is the deadline
    check_options(_wanted(options), limits, sys.maxsize)  # before a model is loaded
    gateway = start_model(options.model, options.model.source(), options.engine, limits)
    print(f"{gateway.model_names[0]}. {_HELP}", file=sys.stderr)
    with asyncio.Runner() as runner:
        runner.run(_start(gateway))
        try:
            _converse(gateway, options, runner)
        finally:
            runner.run(gateway.stop())
    return 0


async def _start(gateway: Gateway) -> None:
    gateway.start()


def _converse(gateway: Gateway, options: Options, runner: asyncio.Runner) -> None:
    opening = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(opening)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)
            print("(forgotten)", file=sys.stderr)
        elif line == "/help":
            print(_HELP, file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                reply = runner.run(_reply(gateway, messages, options))
            except (RequestError, RequestFailedError) as error:
                print(f"fourfold: {error} (/reset starts over)", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": reply})


def _read_line() -> str | None:
    """What the person types, None when they leave."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _wanted(options: Options) -> GenerationOptions:
    from fourfold.gateway.generation import GenerationOptions

    sampling = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    return GenerationOptions(sampling=sampling, up_to=options.max_tokens)


async def _reply(gateway: Gateway, messages: list[dict[str, str]], options: Options) -> str:
    """Prints the reply as it comes; returns what was printed, also when Ctrl-C cuts it short."""
    generation = await gateway.chat(messages, _wanted(options))
    text = ""
    try:
        async for delta in generation:
            text += delta.text
            print(delta.text, end="", flush=True)
    except asyncio.CancelledError:
        print(" (stopped)", end="")
    finally:
        generation.cancel()
        print()
    return text

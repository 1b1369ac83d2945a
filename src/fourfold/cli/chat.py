"""`fourfold chat`: talk to a model in the terminal.

Ctrl-C stops a reply and keeps what was said of it; at the prompt, it or Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from typing import TYPE_CHECKING

from fourfold.cli.options import ModelOptions, check_asked, load_llm
from fourfold.engine.config import EngineConfig
from fourfold.errors import ConfigError, RequestError, RequestFailedError

if TYPE_CHECKING:
    from fourfold.llm import LLM, Asked

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
    from fourfold.gateway.tokenizer import load_tokenizer

    check_asked(_asked(options))
    source = options.model.source()
    words = load_tokenizer(options.model.words(source), dummy=options.model.load == "dummy")
    if words.chat_template is None:  # known before the weights are loaded
        raise ConfigError(
            f"{source.model_id} has no chat template, so it cannot be talked to; give "
            "`fourfold generate` lines with `prompt`, which it continues"
        )
    with load_llm(options.model, source, options.engine) as llm:
        print(f"{llm.name}. {_HELP}", file=sys.stderr)
        _converse(llm, options)
    return 0


def _converse(llm: LLM, options: Options) -> None:
    opening = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(opening)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)
            print("(forgotten)", file=sys.stderr)
        elif line == "/help":
            print(_HELP, file=sys.stderr)
        elif re.fullmatch(r"/\w*", line.partition(" ")[0]):  # a path is none
            print(
                f"fourfold: {line:.80} is no command, so it is not sent; {_HELP}", file=sys.stderr
            )
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                reply = _reply(llm, messages, options)
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
    except UnicodeDecodeError as error:
        raise ConfigError(f"the input cannot be read: {error}; send it in UTF-8") from error


def _asked(options: Options) -> Asked:
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "up_to": options.max_tokens,
    }


def _reply(llm: LLM, messages: list[dict[str, str]], options: Options) -> str:
    """Prints the reply as it comes; returns what was printed, also when Ctrl-C cuts it short."""
    text = ""
    try:
        with contextlib.closing(llm.stream(messages, **_asked(options))) as pieces:
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)")
    except RequestFailedError:
        print()
        raise
    else:
        print()
    return text

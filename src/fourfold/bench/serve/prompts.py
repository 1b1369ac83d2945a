"""Makes the requests of a run before it starts, so that sending one costs only the sending.

Prompts are random: two of them share no prefix but the one asked for, so a prefix cache helps only
as much as the load says. As token ids their lengths are exact. As text they are made of common
words, most of them one token, and the number of words is calibrated on two requests whose usage
the server reports; what it reports for each measured request is the length that counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from fourfold.bench.serve.answer import NOT_JSON
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.endpoint import Endpoint
from fourfold.bench.serve.lengths import parse_lengths
from fourfold.bench.serve.words import WORDS
from fourfold.errors import ConfigError

_TOKEN_IDS = (1000, 20_000)
"""Ids drawn from: plain words in the common vocabularies of 32,000 and more, no special token."""

_PROBE_TOKENS = 64
_MOST_ADDED_TOKENS = 8
"""A server may put this many tokens (a beginning of text) before ids; more, and it read them as
something other than one prompt."""

_CALIBRATION_WORDS = (16, 144)


class _FileLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a prompts file: exactly one of `prompt` and `messages`."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True)
class Requests:
    """Request bodies ready to send, and remarks on how far they are what was asked for."""

    bodies: tuple[bytes, ...]
    notes: tuple[str, ...] = ()


class _Form(Protocol):
    """What a synthetic prompt is made of."""

    def count(self, tokens: int) -> int:
        """How many pieces make about `tokens` prompt tokens."""

    def draw(self, rng: random.Random, pieces: int) -> list[Any]:
        """That many random pieces."""

    def join(self, pieces: list[Any]) -> str | list[int]:
        """The pieces as a request's prompt."""


class TokenIds:
    """Prompts of token ids: a piece is a token."""

    def count(self, tokens: int) -> int:
        return tokens

    def draw(self, rng: random.Random, pieces: int) -> list[int]:
        return [rng.randrange(*_TOKEN_IDS) for _ in range(pieces)]

    def join(self, pieces: list[int]) -> list[int]:
        return pieces


@dataclass(frozen=True)
class Words:
    """Prompts of words: `overhead` tokens (a chat template) and then `rate` tokens a word."""

    overhead: float = 0.0
    rate: float = 1.0

    def count(self, tokens: int) -> int:
        return max(1, round((tokens - self.overhead) / self.rate))

    def draw(self, rng: random.Random, pieces: int) -> list[str]:
        return rng.choices(WORDS, k=pieces)

    def join(self, pieces: list[str]) -> str:
        return " ".join(pieces)


async def make_requests(config: ServeBenchConfig, endpoint: Endpoint, model: str) -> Requests:
    """The bodies of the measured requests, followed by those of the warm-up.

    ConfigError where the prompts file is not one, or the server refuses a first short request.
    """
    count = config.num_requests + config.warmup_requests
    if config.prompts_file is not None:
        lines = _read_lines(config, config.prompts_file)
        repeated = (
            f"{count} requests, the warm-up's among them, take the {len(lines)} prompts of "
            f"{config.prompts_file.name} again: a prefix cache has held them before",
        )
        bodies = tuple(islice(_from_file(config, model, lines), count))
        return Requests(bodies, repeated if len(lines) < count else ())
    form: _Form = TokenIds()
    notes: tuple[str, ...] = ()
    if not await _takes_token_ids(config, endpoint, model):
        form, notes = await _calibrate(config, endpoint, model)
    return Requests(tuple(islice(_synthetic(config, model, form), count)), notes)


def _synthetic(config: ServeBenchConfig, model: str, form: _Form) -> Iterator[bytes]:
    rng = random.Random(f"prompts {config.seed}")
    prompt_lengths = parse_lengths(config.prompt_tokens, "--prompt-tokens")
    output_lengths = parse_lengths(config.output_tokens, "--output-tokens")
    shared = config.shared_prefix_tokens
    prefix = form.draw(rng, form.count(shared)) if shared else []
    while True:
        pieces = form.count(shared + prompt_lengths.draw(rng))
        own = form.draw(rng, max(1, pieces - len(prefix)))
        yield _body(config, model, form.join(prefix + own), output_lengths.draw(rng))


def _from_file(config: ServeBenchConfig, model: str, lines: Sequence[_FileLine]) -> Iterator[bytes]:
    """Bodies for the lines of a prompts file in order, and from its start again at its end."""
    rng = random.Random(f"prompts {config.seed}")
    output_lengths = parse_lengths(config.output_tokens, "--output-tokens")
    for line in cycle(lines):
        tokens = line.max_tokens or output_lengths.draw(rng)
        prompt = line.prompt if line.messages is None else line.messages
        assert prompt is not None
        yield _body(config, model, prompt, tokens)


def _read_lines(config: ServeBenchConfig, path: Path) -> list[_FileLine]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-tokens jsonl:{path} cannot be read: {error}") from error
    chat = config.endpoint == "chat"
    lines = []
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = msgspec.json.decode(raw, type=_FileLine)
        except NOT_JSON as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if (line.prompt is None) == (line.messages is None):
            raise ConfigError(f"{path}, line {number}: give either prompt or messages")
        if line.messages is not None and not chat:
            raise ConfigError(f"{path}, line {number}: messages need --endpoint chat")
        if isinstance(line.prompt, list) and chat:
            raise ConfigError(f"{path}, line {number}: token ids need --endpoint completions")
        lines.append(line)
    if not lines:
        raise ConfigError(f"{path} holds no prompts; write one JSON object a line")
    return lines


async def _takes_token_ids(config: ServeBenchConfig, endpoint: Endpoint, model: str) -> bool:
    """Whether prompts go out as token ids; under `auto` the server decides, by how it answers."""
    if config.endpoint == "chat" or config.prompt_form == "text":
        return False
    form = TokenIds()
    ids = form.draw(random.Random(f"probe {config.seed}"), _PROBE_TOKENS)
    status, counted, message = await endpoint.count_prompt(_fields(config, model, ids, 1))
    if config.prompt_form == "auto":
        added = 0 if counted is None else counted - len(ids)
        return status == 200 and 0 <= added <= _MOST_ADDED_TOKENS
    if status != 200:
        raise ConfigError(
            f"{config.base_url} refuses a prompt of token ids with HTTP {status} ({message}); "
            "leave out --prompt-form tokens"
        )
    return True


async def _calibrate(
    config: ServeBenchConfig, endpoint: Endpoint, model: str
) -> tuple[Words, tuple[str, ...]]:
    """Fits `Words` to the server's tokenizer with two requests of different length."""
    rng = random.Random(f"calibration {config.seed}")
    form = Words()
    counts = []
    for words in _CALIBRATION_WORDS:
        prompt = form.join(form.draw(rng, words))
        status, counted, message = await endpoint.count_prompt(_fields(config, model, prompt, 1))
        if status != 200:
            raise ConfigError(
                f"{config.base_url} refuses a first request of {words} words with HTTP {status} "
                f"({message}); see --model, --endpoint and --api-key"
            )
        counts.append(counted)
    short, long = counts
    if short is None or long is None or long <= short:
        note = "the server counts no prompt tokens: prompts have one word per token asked for"
        return form, (note,)
    fewer, more = _CALIBRATION_WORDS
    rate = (long - short) / (more - fewer)
    return Words(overhead=short - fewer * rate, rate=rate), ()


def _body(
    config: ServeBenchConfig,
    model: str,
    prompt: str | list[int] | list[dict[str, Any]],
    max_tokens: int,
) -> bytes:
    """A measured request: streamed, with the server's token counts at the end."""
    fields = _fields(config, model, prompt, max_tokens)
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if config.ignore_eos:
        fields["ignore_eos"] = True
    return msgspec.json.encode(fields)


def _fields(
    config: ServeBenchConfig,
    model: str,
    prompt: str | list[int] | list[dict[str, Any]],
    max_tokens: int,
) -> dict[str, Any]:
    fields = {"model": model, "max_tokens": max_tokens, "temperature": config.temperature}
    if config.endpoint == "completions":
        return fields | {"prompt": prompt}
    if isinstance(prompt, str):
        return fields | {"messages": [{"role": "user", "content": prompt}]}
    return fields | {"messages": prompt}

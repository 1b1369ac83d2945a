"""The options of `fourfold bench serve`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fourfold.bench.command_line import command_line
from fourfold.bench.serve.lengths import parse_lengths
from fourfold.errors import ConfigError

_JSONL = "jsonl:"


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """Loads an OpenAI-compatible server and reports TTFT, TPOT, ITL, throughput and goodput.

    Requests arrive at --request-rate, whether or not the server keeps up (open loop), or
    --concurrency clients each send their next request when the last is answered (closed loop).
    Only an open loop shows how a server queues. Several rates are run one after the other, each
    with prompts of its own: a curve of latency over load. Prompts are synthetic unless read from a
    file, whose prompts are the same at each rate.
    """

    base_url: str = "http://127.0.0.1:8000"
    """Where the server listens; a trailing /v1 may be given."""

    model: str | None = None
    """The model to ask for; by default the first that /v1/models lists."""

    api_key: str | None = None
    """Sent as a bearer token; never written into the record."""

    endpoint: Literal["chat", "completions"] = "chat"
    """/v1/chat/completions or /v1/completions."""

    num_requests: int = 100
    """How many requests are measured, at each rate."""

    seconds: float | None = None
    """For how long requests arrive at each rate, instead of --num-requests."""

    request_rate: tuple[float, ...] = (math.inf,)
    """Mean arrivals per second, one or several rates; inf sends all at once."""

    burstiness: float = 1.0
    """Shape of the gamma-distributed gaps between arrivals: 1 is Poisson, less comes in bursts,
    more is more regular."""

    concurrency: int | None = None
    """Closed loop with this many clients, instead of a request rate."""

    prompt_tokens: str = "512"
    """Prompt length in tokens: 512, uniform:128:1024, lognormal:512:0.8[:MAX]; or jsonl:FILE with
    a {"prompt": ...} or {"messages": ...} a line, and optionally "max_tokens"."""

    output_tokens: str = "128"
    """Most tokens to generate, a length like those of --prompt-tokens. Without --ignore-eos an
    answer may be shorter."""

    prompt_form: Literal["auto", "tokens", "text"] = "auto"
    """Completions only: send prompts as token ids (exact lengths) or as text. auto sends ids where
    the server takes them."""

    shared_prefix_tokens: int = 0
    """Tokens at the head of every prompt that are the same in all, beside --prompt-tokens."""

    seed: int = 0
    """Seeds prompts, lengths and arrival times. A second run with the same seed against the same
    server finds its prompts in the prefix cache: restart the server, or change the seed."""

    ignore_eos: bool = False
    """Ask the server to generate all --output-tokens; not every server knows the field."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    timeout: float = 600.0
    """Seconds from sending until a request counts as failed."""

    slo_ttft: float | None = None
    """Goodput counts requests whose first token took at most this many seconds."""

    slo_tpot: float | None = None
    """Goodput counts requests whose mean time per further token is at most this many seconds."""

    warmup_requests: int = 1
    """Requests sent before the measured ones, as many at once as the load allows; not counted."""

    name: str = "serve"
    """The record's name, by which the README's tables find it."""

    case: str | None = None
    """The record's case, of a run at one rate; by default a description of the load."""

    peer: str | None = None
    """Another server's record of the same load, as NAME=FILE.json: its figures go beside ours."""

    out: Path | None = None
    """Write the record here (JSON)."""

    details: Path | None = None
    """Write one line per request here (JSONL)."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        self._check_load()
        self._check_prompts()
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(
                "--api-key holds characters that no header can; check what was pasted"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature {self.temperature} must be 0 or more")
        if self.peer is not None and not all(self.peer.partition("=")):
            raise ConfigError(f"--peer {self.peer!r} must be NAME=FILE.json")

    def _check_load(self) -> None:
        _at_least("num-requests", self.num_requests, 1)
        _at_least("warmup-requests", self.warmup_requests, 0)
        options = ("seconds", "burstiness", "timeout", "slo_ttft", "slo_tpot")
        values = [(option, getattr(self, option)) for option in options]
        for option, value in [*values, *(("request_rate", rate) for rate in self.request_rate)]:
            if value is not None and not value > 0:
                raise ConfigError(f"{_flag(option)} {value} must be more than 0")
        if self.case is not None and len(self.request_rate) > 1:
            raise ConfigError("--case names one load; leave it out with several rates")
        if len(set(self.request_rate)) != max(1, len(self.request_rate)):
            raise ConfigError("--request-rate needs one rate or several different ones")
        if self.concurrency is not None:
            _at_least("concurrency", self.concurrency, 1)
            if self.request_rate != (math.inf,):
                raise ConfigError(
                    "--concurrency and --request-rate exclude each other: in a closed loop the "
                    "server sets the rate; give one of them"
                )
        if not all(map(math.isfinite, self.request_rate)):
            if self.burstiness != 1.0:
                raise ConfigError("--burstiness shapes a --request-rate; give one")
            if self.seconds is not None:
                raise ConfigError("--seconds goes with finite rates; give --request-rate")

    def _check_prompts(self) -> None:
        parse_lengths(self.output_tokens, "--output-tokens")
        _at_least("shared-prefix-tokens", self.shared_prefix_tokens, 0)
        if self.prompts_file is None:
            parse_lengths(self.prompt_tokens, "--prompt-tokens")
        elif self.shared_prefix_tokens or self.prompt_form != "auto":
            raise ConfigError(
                "--shared-prefix-tokens and --prompt-form make synthetic prompts; leave them out "
                "with --prompt-tokens jsonl:FILE"
            )
        if self.endpoint == "chat" and self.prompt_form == "tokens":
            raise ConfigError(
                "--prompt-form tokens needs --endpoint completions: a chat is always text"
            )

    @property
    def prompts_file(self) -> Path | None:
        """The file prompts are read from; None where they are synthetic."""
        if not self.prompt_tokens.startswith(_JSONL):
            return None
        return Path(self.prompt_tokens.removeprefix(_JSONL))

    @property
    def open_loop(self) -> bool:
        """Whether arrivals follow a schedule of their own."""
        return self.concurrency is None

    @property
    def rate(self) -> float:
        """Mean arrivals per second of a run at one rate."""
        [rate] = self.request_rate
        return rate

    def runs(self) -> list[ServeBenchConfig]:
        """One run for each rate, with other prompts and so many requests as arrive in its time."""
        return [
            replace(
                self,
                request_rate=(rate,),
                seed=self.seed + number,
                num_requests=self.num_requests
                if self.seconds is None
                else max(1, round(rate * self.seconds)),
                seconds=None,
            )
            for number, rate in enumerate(self.request_rate)
        ]

    def describe(self) -> str:
        """The case of a run at one rate: what was asked of the server, in a few words."""
        if self.case is not None:
            return self.case
        if self.concurrency is not None:
            load = f"{self.concurrency} concurrent"
        elif math.isinf(self.rate):
            load = "all at once"
        else:
            load = f"{self.rate:g} req/s"
        prefix = f"{self.shared_prefix_tokens} shared + " if self.shared_prefix_tokens else ""
        source = self.prompts_file
        prompts = f"{prefix}{self.prompt_tokens}" if source is None else source.name
        requests = f"{self.num_requests} {self.endpoint} requests"
        return f"{requests}, {load}, {prompts} in, {self.output_tokens} out"

    def command(self) -> str:
        """The command line that gives these options again, with the API key left to the caller."""
        return command_line("fourfold bench serve", self)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _at_least(option: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"--{option} {value} must be at least {minimum}")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url {url!r} must look like http://127.0.0.1:8000")
    if parts.username or parts.query or parts.fragment:
        raise ConfigError(
            f"--base-url {parts.scheme}://{parts.hostname} must hold no user, query or fragment; "
            "a key goes into --api-key"
        )
    try:
        parts.port  # noqa: B018 - the property is where a bad port is found
    except ValueError as error:
        raise ConfigError(f"--base-url {url!r}: {error}") from error

"""The options of `fourfold bench roles`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.bench.command_line import command_line
from fourfold.errors import ConfigError

_LAYOUT = re.compile(r"[1-9]\d*(:[1-9]\d*)?")


@dataclass(frozen=True, kw_only=True)
class RolesBenchConfig:
    """Serves a model in several layouts, in turns, and asks each for the same.

    First prompts come one by one. Their first token leaves before their pages are moved, so the
    time from it to the second shows what it costs to move a prompt. Then answers are streamed while
    other prompts arrive at a rate: the gaps between their tokens show what it gains.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """As for `fourfold serve`; without it, the embedded default."""

    layouts: tuple[str, ...] = ("1", "1:1")
    """Workers: a number of those that do both, or PREFILL:DECODE. The first is the others' peer."""

    server: str = ""
    """Further options of `fourfold serve`: --server="--precision w4a8 --device cuda"."""

    prompt_tokens: int = 4096
    """Tokens of the prompts that come one by one."""

    prompts: int = 8
    """How many prompts come one by one."""

    streams: int = 8
    """Answers that are streamed at a time."""

    stream_tokens: int = 256
    """Tokens of each streamed answer."""

    arriving_tokens: int = 1024
    """Tokens of the prompts that arrive while answers are streamed."""

    arriving_rate: float = 2.0
    """Prompts a second that arrive while answers are streamed."""

    settle: float = 0.0
    """Seconds that a layout is left alone once it is ready: on a GPU its workers record the graphs
    of usual steps meanwhile."""

    turns: int = 2
    """How often each layout is started and measured; the figures are over all turns."""

    name: str = "roles"
    """The record's name, by which the README's tables find it."""

    out: Path | None = None
    """Write the record here (JSON)."""

    def __post_init__(self) -> None:
        for layout in self.layouts:
            if not _LAYOUT.fullmatch(layout):
                raise ConfigError(f"--layouts {layout} must be N or PREFILL:DECODE, such as 1:2")
        if len(set(self.layouts)) < len(self.layouts) or not self.layouts:
            raise ConfigError("--layouts must name one layout or several different ones")
        for field in (
            "prompt_tokens", "prompts", "streams", "stream_tokens", "arriving_tokens", "turns"
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ConfigError(f"--{field.replace('_', '-')} must be at least 1")
        if self.stream_tokens < 2:
            raise ConfigError("--stream-tokens must be at least 2, or there is no gap to measure")
        if not 0 <= self.settle < math.inf:
            raise ConfigError(f"--settle {self.settle} must be seconds, not negative")
        if not self.arriving_rate > 0:
            raise ConfigError(f"--arriving-rate {self.arriving_rate} must be positive")

    def serve(self, layout: str) -> list[str]:
        """The arguments of the `fourfold` that serves a layout."""
        prefill, _, decode = layout.partition(":")
        workers = ["--prefill", prefill, "--decode", decode] if decode else ["--workers", prefill]
        model = [] if self.model is None else [self.model]
        return ["serve", *model, *workers, *shlex.split(self.server), "--port", "0"]

    def command(self) -> str:
        """The command that repeats the run."""
        return command_line("fourfold bench roles", self, positional="model")

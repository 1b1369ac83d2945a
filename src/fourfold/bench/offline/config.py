"""The options of `fourfold bench offline`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fourfold.bench.command_line import check_distinct
from fourfold.bench.offline.cases import Kind, parse_case
from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat, Precision

Peer = Literal["transformers", "llama.cpp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineBenchConfig:
    """Measures prefill and decode of the engine alone, in turns with other engines.

    Every figure is the median over the rounds; of prompts, each round's is the better of two runs,
    and of decoding the slope between two lengths, for every engine alike. On a GPU figures are set
    beside what its memory and its tensor cores allow, and the device's timeline is recorded too,
    after everything else.
    `transformers` computes the same weights dense and dequantised in float32; `llama.cpp`
    (llama-cpp-python) computes the GGUF file as it is.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A directory, a .gguf file or a hub id; without it, the embedded default. Peers need GGUF."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.AUTO
    """What our engine computes in, as for `fourfold serve`."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What our engine keeps keys and values in, as for `fourfold serve`."""
    load: Literal["checkpoint", "dummy"] = "checkpoint"
    """dummy: random weights; only the configuration is read. Peers then have nothing to load."""
    routing: Literal["router", "uniform"] = "router"
    """uniform: spread tokens evenly over the experts; only with --load dummy."""
    peers: tuple[Peer, ...] = ()
    """Engines to measure beside ours; they must be installed."""
    cases: tuple[str, ...] = ("prefill-1x512", "decode-1x512", "decode-16x128")
    """What is measured: prefill-PROMPTSxTOKENS, decode-BATCHxCONTEXT, requests-COUNTxINxOUT."""
    max_running: int | None = None
    """Our samples computed together at most. Default: a case's requests, at most 512."""
    step_tokens: int | None = None
    """Our tokens of one step at most. Default: a case's prompts, at most 16384."""
    mixed_tokens: int | None = None
    """Our tokens of prompts at most in a step that also decodes. Default: no limit, since nobody
    waits for the next token here."""
    kv_memory_gib: float | None = None
    """Our memory for KV pages in GiB. Default: as when serving."""
    rounds: int = 3
    """Turns; each engine starts anew in each."""
    marks: Path | None = None
    """A file of what is to be reached in each case, and what others reached (benchmarks/marks)."""
    profiles: Path | None = None
    """A folder for one table per case of what the GPU spent its time on."""
    name: str = "offline"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        check_distinct("--cases", self.cases)
        check_distinct("--peers", self.peers)
        if not self.cases:
            raise ConfigError("--cases names nothing to measure; leave it out for the usual ones")
        batch = max(map(self._decode_batch, self.cases))
        if self.max_running is not None and self.max_running < batch:
            raise ConfigError(f"--max-running {self.max_running} is less than a batch of {batch}")
        for name in ("max_running", "step_tokens", "mixed_tokens", "kv_memory_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be positive")
        if self.peers and self.load == "dummy":
            raise ConfigError("--load dummy gives peers nothing to load; leave out --peers")
        alone = any(parse_case(name).requests == 1 for name in self.cases)
        if "llama.cpp" in self.peers and not alone:
            raise ConfigError(
                "--peers llama.cpp answers one prompt at a time; add a case of one to --cases"
            )
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds} must be at least 1")
        if self.marks is not None and not self.marks.is_file():
            raise ConfigError(f"--marks {self.marks} is not a file")

    @staticmethod
    def _decode_batch(name: str) -> int:
        """Requests of a case that must all run together, at least 1."""
        case = parse_case(name)
        return case.requests if case.kind is Kind.DECODE else 1

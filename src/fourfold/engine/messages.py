"""What crosses the boundary between a gateway and an engine, in both directions.

Plain immutable msgspec structs without tensors, so that the same messages serve a thread in this
process and a worker behind a wire. The gateway makes `Submit` and `Abort`; the engine answers each
sample of a request with `TokenOutput`s, the last of which carries a finish reason.

A request may be cut in two (`Stage`): one engine computes its prompt, another its answer. The
gateway then submits it to both. The decoding engine reserves pages and says `Granted`, which the
gateway passes to the prefilling one; that one sends the pages as it computes them, and the first
token to the gateway, who passes it on as `Continue`. Both say `Moved` when the pages are there, or
why not.
"""

from __future__ import annotations

import enum

import msgspec

from fourfold.transport.peer import Peer


class FinishReason(enum.StrEnum):
    """Why a sample ended. Every sample of every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Filters apply in the order they are listed here.

    The penalties act on raw logits: repetition (HF: divide positive, multiply negative logits of
    tokens in prompt or output), then presence and frequency (OpenAI: subtract, output only), then
    `logit_bias`. Temperatures below 1e-4 take the argmax.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """Keys the noise together with sample index and position. None: the request's number, which is
    another each time it is tried; so a gateway draws one."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many alternatives; None reports none."""
    prompt_logprobs: bool = False
    """Report log-probabilities of the prompt's own tokens too (with `logprobs`)."""
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sample (the model's end-of-text ids included by the gateway)."""


class Role(enum.StrEnum):
    """What a worker is given to compute. Every worker can compute everything."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class Stage(enum.StrEnum):
    """Which part of a request an engine computes."""

    WHOLE = "whole"
    PREFILL = "prefill"
    """The prompt, and the first sample's next token."""
    DECODE = "decode"
    """What follows; the prompt's pages come from another engine."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One request: `n` samples of one prompt, numbered from `index`."""

    request_id: int
    """Of this engine's part; a request that is tried again has another."""
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    index: int = 0
    generated: tuple[int, ...] = ()
    """Tokens that the one sample (`n` is 1) has got already, elsewhere."""
    stage: Stage = Stage.WHOLE
    peer: Peer | None = None
    """Unless the stage is WHOLE: where the pages go, or come from."""


class Granted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The decoding engine holds pages for a prompt; the first `found` of them it had already."""

    request_id: int
    found: int = 0
    pulls: bool = False
    """It copies pages out of the other engine's memory itself, and is only to be told of them."""


class Continue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first sample's next token, for the decoding engine, which does not report it; `finish`
    if it was the sample's last."""

    request_id: int
    token: int
    finish: FinishReason | None = None


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A prompt's pages are all there, or will never be because of `error`.

    Said by both engines. After an error the prefilling engine has let go of its part; the decoding
    one holds its pages until it is told to abort.
    """

    request_id: int
    error: str | None = None


HandoverNews = Granted | Moved
"""What an engine reports beside tokens."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the samples of a request that still run; `index` None means all of them.

    `reason` is echoed in the final `TokenOutput`: STOP when the gateway matched a stop string,
    CANCELLED when nobody listens any more.
    """

    request_id: int
    index: int | None = None
    reason: FinishReason = FinishReason.CANCELLED


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token with its log-probability under the unmodified model, and the likeliest others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one step added to one sample. `token` is None where a sample ends without a new one."""

    request_id: int
    index: int
    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry for each prompt token but the first; with the first output of the first sample."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; with the sample's first output only."""
    finish: FinishReason | None = None
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of this moment and counters since the start."""

    running: int = 0
    """Samples in the batch. Each sample is in this number, in `waiting` or in `moving` of one
    engine; where prompts are computed apart it goes over to the other with its first token."""
    waiting: int = 0
    """Samples that wait for room."""
    moving: int = 0
    """Samples that have their first token and wait for their prompt's pages from elsewhere."""
    shared: int = 0
    """Samples of which a part is here that another engine counts."""
    pages_total: int = 0
    pages_in_use: int = 0
    pages_cached: int = 0
    """Pages nobody owns that a prefix may still find."""
    prompt_tokens: int = 0
    """Prompt tokens computed, once more after a preemption; those found in the prefix cache are
    `cached_tokens`."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    shortages: int = 0
    """Steps that did not fit into memory and were tried smaller."""
    step_tokens: int = 0
    """Tokens that a step may hold now: fewer than was asked for after a shortage."""
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    """Of the host, to decide what to compute."""
    launch_seconds: float = 0.0
    """Of the host, to describe steps, plan them and enqueue them."""
    wait_seconds: float = 0.0
    """Of the host, until the device had computed a step."""
    commit_seconds: float = 0.0
    """Of the host, to take a step's tokens in."""
    graphs: int = 0
    """CUDA graphs recorded."""

"""Whether a request fits the budgets. Checked once, before anything is allocated for it."""

from __future__ import annotations

import math

from fourfold.errors import RequestError
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.generation import GenerationOptions

_SEED_BITS = 64


def check_budget(
    options: GenerationOptions,
    prompt_tokens: int,
    limits: GatewayLimits,
    *,
    vocabulary: int,
    context_length: int,
    prompt_field: str = "prompt",
) -> int:
    """The tokens each sample may have. Raises `RequestError` naming the field at fault."""
    check_options(options, limits, vocabulary)
    longest = min(limits.max_prompt_tokens or context_length, context_length - 1)
    if prompt_tokens < 1:
        raise RequestError("the prompt is empty; send at least one token", param=prompt_field)
    if prompt_tokens > longest:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and at most {longest} are served; shorten it",
            param=prompt_field,
            code="context_length_exceeded",
        )
    room = context_length - prompt_tokens
    largest = min(limits.max_output_tokens or room, room)
    if options.max_tokens is None:
        return min(options.up_to or largest, largest)
    if options.max_tokens > largest:
        raise RequestError(
            f"max_tokens {options.max_tokens} with a prompt of {prompt_tokens} tokens exceeds "
            f"what is served; at most {largest} tokens are left",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return options.max_tokens


def check_options(options: GenerationOptions, limits: GatewayLimits, vocabulary: int) -> None:
    """The part of `check_budget` that needs no prompt."""
    sampling = options.sampling
    _within("n", options.n, 1, limits.max_n)
    for most in (options.max_tokens, options.up_to):
        if most is not None and most < 1:
            raise RequestError(f"max_tokens {most} must be at least 1", param="max_tokens")
    _within("temperature", sampling.temperature, 0.0, 2.0)
    _within("top_p", sampling.top_p, 0.0, 1.0)
    _within("min_p", sampling.min_p, 0.0, 1.0)
    _within("top_k", sampling.top_k, 0, vocabulary)
    _within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _within("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)
    if sampling.seed is not None:
        _within("seed", sampling.seed, -(2 ** (_SEED_BITS - 1)), 2**_SEED_BITS - 1)
    if sampling.logprobs is not None:
        _within("top_logprobs", sampling.logprobs, 0, min(limits.max_logprobs, vocabulary))
    elif sampling.prompt_logprobs:
        raise RequestError(
            "prompt_logprobs needs logprobs; give it too, 0 for no alternatives",
            param="prompt_logprobs",
        )
    if len(options.stop) > limits.max_stop:
        raise RequestError(
            f"{len(options.stop)} stop strings are too many; send at most {limits.max_stop}",
            param="stop",
        )
    if any(not stop for stop in options.stop):
        raise RequestError("an empty stop string would stop at once; remove it", param="stop")
    if len(sampling.logit_bias) > limits.max_logit_bias:
        raise RequestError(
            f"logit_bias has {len(sampling.logit_bias)} entries; at most "
            f"{limits.max_logit_bias} are served",
            param="logit_bias",
        )
    for token, bias in sampling.logit_bias.items():
        _known(token, vocabulary, "logit_bias")
        _within("logit_bias", bias, -100.0, 100.0)
    for token in sampling.stop_token_ids:
        _known(token, vocabulary, "stop_token_ids")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} {value} must be between {low} and {high}", param=name)


def _known(token: int, vocabulary: int, param: str) -> None:
    if not 0 <= token < vocabulary:
        raise RequestError(
            f"{param} names token {token}, and the vocabulary ends at {vocabulary - 1}",
            param=param,
        )

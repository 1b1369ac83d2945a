"""What a request may ask for: each row one field at its edge."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from fourfold.engine.messages import SamplingParams
from fourfold.errors import ConfigError, RequestError
from fourfold.gateway.budget import check_budget
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.generation import GenerationOptions

VOCABULARY, CONTEXT = 320, 100
LIMITS = GatewayLimits(max_n=4, max_stop=3, max_logprobs=5, max_logit_bias=2)
INF, NAN = math.inf, math.nan
OF_OPTIONS = {"max_tokens", "n", "stop"}


def asking(**fields: Any) -> GenerationOptions:
    sampling = {name: value for name, value in fields.items() if name not in OF_OPTIONS}
    options = {name: value for name, value in fields.items() if name in OF_OPTIONS}
    return GenerationOptions(sampling=SamplingParams(**sampling), **options)


def check(
    options: GenerationOptions, prompt_tokens: int = 10, limits: GatewayLimits = LIMITS
) -> int:
    return check_budget(
        options, prompt_tokens, limits, vocabulary=VOCABULARY, context_length=CONTEXT
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": -1}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 91}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": NAN}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": VOCABULARY + 1}, "top_k"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": NAN}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": INF}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"logprobs": -1}, "top_logprobs"),
        ({"logprobs": 6}, "top_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"stop": ("a",) * 4}, "stop"),
        ({"stop": ("a", "")}, "stop"),
        ({"logit_bias": {0: 0.0, 1: 0.0, 2: 0.0}}, "logit_bias"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {0: 100.5}}, "logit_bias"),
        ({"logit_bias": {0: NAN}}, "logit_bias"),
        ({"stop_token_ids": (VOCABULARY,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ],
)
def test_refused_naming_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(asking(**fields))
    assert caught.value.param == param
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 4},
        {"max_tokens": 1},
        {"max_tokens": 90},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 0.0},
        {"top_p": 1.0, "min_p": 1.0, "top_k": VOCABULARY},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"logprobs": 0},
        {"logprobs": 5},
        {"stop": ("a", "b", "c")},
        {"logit_bias": {0: -100.0, VOCABULARY - 1: 100.0}},
        {"stop_token_ids": (0, VOCABULARY - 1)},
    ],
)
def test_accepted_at_the_edge(fields: dict[str, Any]) -> None:
    assert check(asking(**fields)) == fields.get("max_tokens", CONTEXT - 10)


@pytest.mark.parametrize(
    ("prompt", "asked", "limits", "wanted"),
    [
        (1, None, {}, 99),
        (99, None, {}, 1),
        (10, None, {"max_output_tokens": 7}, 7),
        (10, 7, {"max_output_tokens": 7}, 7),
        (97, None, {"max_output_tokens": 7}, 3),
        (20, None, {"max_prompt_tokens": 20}, 80),
        (99, None, {"max_prompt_tokens": 1000}, 1),
    ],
)
def test_tokens_that_a_sample_may_have(
    prompt: int, asked: int | None, limits: dict[str, int], wanted: int
) -> None:
    assert check(asking(max_tokens=asked), prompt, GatewayLimits(**limits)) == wanted


@pytest.mark.parametrize(
    ("prompt", "asked", "limits", "code"),
    [
        (0, None, {}, None),
        (100, None, {}, "context_length_exceeded"),
        (10**6, 1, {}, "context_length_exceeded"),
        (21, None, {"max_prompt_tokens": 20}, "context_length_exceeded"),
        (10, 8, {"max_output_tokens": 7}, "context_length_exceeded"),
        (97, 4, {"max_output_tokens": 7}, "context_length_exceeded"),
    ],
)
def test_prompts_and_answers_that_do_not_fit(
    prompt: int, asked: int | None, limits: dict[str, int], code: str | None
) -> None:
    with pytest.raises(RequestError) as caught:
        check(asking(max_tokens=asked), prompt, GatewayLimits(**limits))
    assert caught.value.code == code


def test_every_sampling_field_is_checked_or_needs_no_check() -> None:
    """A field added to `SamplingParams` must get its row above."""
    plain = {"max_tokens"}  # the gateway itself decides it
    checked = {
        *("temperature", "top_p", "min_p", "top_k", "seed", "logprobs", "logit_bias"),
        "prompt_logprobs",
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids"),
    }
    assert {field.name for field in msgspec.structs.fields(SamplingParams)} == plain | checked


@pytest.mark.parametrize(
    "limits",
    [
        {"max_n": 0},
        {"max_concurrent": 0},
        {"max_prompt_tokens": 0},
        {"max_output_tokens": -1},
        {"request_timeout": 0.0},
        {"request_timeout": NAN},
        {"max_logprobs": -1},
        {"max_logit_bias": -1},
    ],
)
def test_limits_that_would_serve_nobody_are_refused(limits: dict[str, Any]) -> None:
    [name] = limits
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        GatewayLimits(**limits)


def test_more_alternatives_than_tokens_are_refused_whatever_the_limit() -> None:
    """A step that had to find them would fail, with all others in it."""
    limits = GatewayLimits(max_logprobs=10 * VOCABULARY)
    check(asking(logprobs=VOCABULARY), limits=limits)
    with pytest.raises(RequestError, match=f"between 0 and {VOCABULARY}"):
        check(asking(logprobs=VOCABULARY + 1), limits=limits)

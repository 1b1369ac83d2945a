"""The requests of /v1/chat/completions and /v1/completions, checked field by field.

Three rules. A field that could change the answer is honoured or refused, never ignored, and it is
given once. A value has exactly the type OpenAI documents: no "1" for 1, no NaN, no NUL in a text.
And every refusal is a sentence that names the remedy: `faults` turns into one whatever pydantic
finds by itself.

What depends on the model or on the server's limits (lengths, `n`, how many stop strings, ids in
the vocabulary) is not here: the gateway checks it, before anything is allocated.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationInfo,
    model_validator,
)

from fourfold.api.faults import fault
from fourfold.engine.messages import SamplingParams
from fourfold.gateway.generation import GenerationOptions

MAX_MESSAGES = 4096
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for the older API, or fewer where fewer are left; chat has none and may fill
the context."""

_REMEDIES = {
    "annotations": "only 'content' is shown to the model; leave it out",
    "audio": "answers are text; leave it out",
    "best_of": "it must equal 'n'; ask for 'n' samples and choose among them",
    "function_call": "tool calls are not built yet; leave it out",
    "functions": "tool calls are not built yet; describe the functions in a message",
    "modalities": 'answers are text; send ["text"] or leave it out',
    "moderation": "nothing moderates here; leave it out",
    "name": "chat templates have no place for it; write the name into 'content'",
    "parallel_tool_calls": "tool calls are not built yet; leave it out",
    "prediction": "predicted outputs are not built yet; leave it out",
    "prompt_cache_options": "prompts are cached without being asked; leave it out",
    "prompt_cache_retention": "prompts are cached while memory lasts; leave it out",
    "reasoning_effort": "no model served takes it; ask for brevity or depth in a message",
    "refusal": "only 'content' is shown to the model; move the text there",
    "response_format": 'only {"type": "text"} is built yet; describe the format in a message',
    "service_tier": "there is one tier; send 'auto' or leave it out",
    "store": "nothing is stored; send false or leave it out",
    "suffix": "no model served fills in the middle; leave it out",
    "tool_call_id": "tool calls are not built yet; leave it out",
    "tool_calls": "tool calls are not built yet; write what was called into 'content'",
    "tool_choice": "tool calls are not built yet; leave it out",
    "tools": "tool calls are not built yet; describe the tools in a message",
    "verbosity": "no model served takes it; ask for brevity in a message",
    "web_search_options": "nothing searches here; put what was found into a message",
    "include_obfuscation": "chunks are not padded; send false or leave it out",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "include_obfuscation": (False,),
}


def _unsupported(value: Any, info: ValidationInfo) -> None:
    """Refuses a field that OpenAI knows and this server does not honour, unless it asks nothing."""
    name = info.field_name or ""
    neutral = _NEUTRAL.get(name, ())
    if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
        raise fault("unsupported_parameter", f"'{name}' is not supported: {_REMEDIES[name]}")


def _clean(text: str) -> str:
    if "\0" in text:
        raise fault("invalid_value", "the text holds a NUL character (U+0000); remove it")
    return text


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else _or_empty(value)


def _or_empty(value: Any) -> Any:
    return [] if value is None else value


def _joined_parts(value: Any) -> Any:
    """Message content as one string; text parts are joined by newlines, as llama.cpp does."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            remedy = "only text is read yet; send parts of type 'text'"
            raise fault("unsupported_parameter", f"part {index} is not supported: {remedy}")
        if kind is None or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            shape = '{"type": "text", "text": "..."}'
            raise fault("invalid_type", f"part {index} must be exactly {shape}")
        texts.append(part["text"])
    if not texts:
        raise fault("invalid_value", "the list of parts is empty; send a string or text parts")
    return "\n".join(texts)


def _role(value: Any) -> str:
    if value in ("tool", "function"):
        remedy = "tool calls are not built yet; send the result as a message from 'user'"
        raise fault("unsupported_parameter", f"the role '{value}' is not supported: {remedy}")
    if value not in ("system", "developer", "user", "assistant"):
        roles = "'system', 'developer', 'user' or 'assistant'"
        raise fault("invalid_value", f"a role must be {roles}")
    return str(value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """The four shapes of `prompt` as one: a tuple of texts or token ids."""
    if isinstance(value, str):
        return (_clean(value),)
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return (_token_ids(value),)
        if kinds == {str}:
            return tuple(map(_clean, value))
        if kinds == {list}:
            return tuple(map(_token_ids, value))
    shapes = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
    raise fault("invalid_type", f"it must be {shapes}, and not an empty list")


def _token_ids(ids: list[Any]) -> tuple[int, ...]:
    if not ids or set(map(type, ids)) != {int} or min(ids) < 0:
        raise fault("invalid_value", "token ids must be integers of 0 or more, at least one")
    return tuple(ids)


def _biases(value: Any) -> dict[int, float]:
    """`logit_bias`, whose keys are token ids written as strings because JSON has no others."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fault("invalid_type", 'it must be an object such as {"50256": -100}')
    for token, bias in value.items():
        if not (token.isascii() and token.removeprefix("-").isdigit() and len(token) < 12):
            raise fault("invalid_value", 'its keys must be token ids, such as {"50256": -100}')
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise fault("invalid_value", "its values must be numbers from -100 to 100")
    biases = {int(token): float(bias) for token, bias in value.items()}
    if len(biases) < len(value):
        raise fault("invalid_value", "it biases one token twice, as in 5 and 05; send each once")
    return biases


Text = Annotated[str, AfterValidator(_clean)]
Unsupported = Annotated[None, PlainValidator(_unsupported)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_clean)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Message(_Strict):
    """One message of a conversation."""

    role: Annotated[str, PlainValidator(_role)]
    content: Annotated[Text, BeforeValidator(_joined_parts)]

    name: Unsupported = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """An extension of vLLM's: where usage is included, every chunk tells it so far."""
    include_obfuscation: Unsupported = None


class _SamplingRequest(_Strict):
    """What both APIs share."""

    model: str
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[list[StopText], FailFast(), BeforeValidator(_strings)] = []
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases)] = {}
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions that other open servers take under the same names.
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[list[TokenId], FailFast(), BeforeValidator(_or_empty)] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS
    )
    ignore_eos: bool | None = None

    # Accepted because no answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Unsupported = None
    store: Unsupported = None

    @model_validator(mode="after")
    def _usage_needs_stream(self) -> _SamplingRequest:
        if self.stream_options is not None and not self.stream:
            remedy = "set 'stream' to true or leave it out"
            raise fault("invalid_value", f"it needs a stream; {remedy}", param="stream_options")
        return self

    @property
    def samples(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the token counts so far."""
        return (
            self.include_usage
            and self.stream_options is not None
            and bool(self.stream_options.continuous_usage_stats)
        )

    def _options(
        self,
        *,
        max_tokens: int | None,
        up_to: int | None = None,
        logprobs: int | None,
        prompt_logprobs: bool = False,
    ) -> GenerationOptions:
        sampling = SamplingParams(
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias,
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, self.top_k or 0),  # -1 means "all" elsewhere, 0 does here
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(self.stop_token_ids),
        )
        return GenerationOptions(
            sampling=sampling,
            max_tokens=max_tokens,
            up_to=up_to,
            n=self.samples,
            stop=tuple(self.stop),
            ignore_eos=bool(self.ignore_eos),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class ChatRequest(_SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)

    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    modalities: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    response_format: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _roles_in_order(self) -> ChatRequest:
        """Refuses only what no chat template can say; the model's own may refuse more."""
        for index, message in enumerate(self.messages):
            if index and message.role in ("system", "developer"):
                raise fault(
                    "invalid_role_order",
                    f"a '{message.role}' message may only come first, and once; "
                    "merge it into the first message",
                    param=f"messages[{index}].role",
                )
        if self.messages[-1].role != "user":
            raise fault(
                "invalid_role_order",
                "the last message must come from 'user'; add the turn to be answered",
                param=f"messages[{len(self.messages) - 1}].role",
            )
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            remedy = "set 'logprobs' to true as well"
            raise fault("invalid_value", f"it needs logprobs; {remedy}", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            remedy = "send only 'max_completion_tokens'"
            raise fault(
                "invalid_value",
                f"it differs from 'max_completion_tokens'; {remedy}",
                param="max_tokens",
            )
        return self

    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates know them: a developer speaks as the system."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content,
            }
            for message in self.messages
        ]

    def options(self) -> GenerationOptions:
        """What the gateway is asked for."""
        return self._options(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None

    best_of: int | None = Field(None, ge=1)
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.samples:
            raise fault(
                "unsupported_parameter",
                f"'best_of' is not supported: {_REMEDIES['best_of']}",
                param="best_of",
            )
        return self

    def options(self) -> GenerationOptions:
        """What the gateway is asked for, for each prompt."""
        return self._options(
            max_tokens=self.max_tokens,
            up_to=COMPLETION_MAX_TOKENS,
            logprobs=self.logprobs,
            prompt_logprobs=bool(self.echo) and self.logprobs is not None,
        )

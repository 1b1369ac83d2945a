"""The two routes that generate: they check a request, and hand the rest to `Answer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import APIRouter, Request, Response

from fourfold.api.answer import Answer
from fourfold.api.config import ApiConfig
from fourfold.api.errors import HttpError
from fourfold.api.faults import parse
from fourfold.api.following import Admission
from fourfold.api.replies import ChatReply, CompletionReply, Reply
from fourfold.api.schemas import ChatRequest, CompletionRequest
from fourfold.errors import DrainingError, RequestError
from fourfold.gateway.generation import Generation

if TYPE_CHECKING:
    from fourfold.gateway.gateway import Gateway

# The gateway knows one kind of prompt and of logprobs; each API has its own names for them.
_CHAT_NAMES = {"prompt": "messages"}
_NEWER_CHAT_NAMES = {**_CHAT_NAMES, "max_tokens": "max_completion_tokens"}
_COMPLETION_NAMES = {"messages": "prompt", "top_logprobs": "logprobs"}

Body = TypeVar("Body", ChatRequest, CompletionRequest)


def generation_routes(gateway: Gateway, config: ApiConfig) -> APIRouter:
    """POST /v1/chat/completions and POST /v1/completions."""
    router = APIRouter()

    # FastAPI is not asked to parse the bodies: its JSON reader takes NaN and lone surrogates, and
    # its faults speak of the schema. So the schema reads the bytes itself.

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        body = await _checked(request, ChatRequest, gateway)
        names = _CHAT_NAMES if body.max_completion_tokens is None else _NEWER_CHAT_NAMES

        def reply(_: Sequence[Generation]) -> Reply:
            return ChatReply(
                body.model, logprobs=bool(body.logprobs), include_usage=body.include_usage
            )

        return Answer(
            [_speaking(partial(gateway.chat, body.conversation(), body.options()), names)],
            n=body.samples,
            reply=reply,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
        )

    @router.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        body = await _checked(request, CompletionRequest, gateway)
        if len(body.prompt) > config.max_prompts:
            message = f"'prompt' must have at most {config.max_prompts} entries; send them apart"
            raise RequestError(message, param="prompt", code="invalid_value")

        def reply(generations: Sequence[Generation]) -> Reply:
            return CompletionReply(
                body.model,
                logprobs=body.logprobs is not None,
                include_usage=body.include_usage,
                echo=generations if body.echo else (),
                n=body.samples,
            )

        options = body.options()
        return Answer(
            [
                _speaking(partial(gateway.complete, prompt, options), _COMPLETION_NAMES)
                for prompt in body.prompt
            ],
            n=body.samples,
            reply=reply,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
        )

    return router


def check_model(name: str, gateway: Gateway) -> None:
    """Raises a 404 that names what is served, unless `name` is."""
    if name not in gateway.model_names:
        served = ", ".join(f"'{served}'" for served in gateway.model_names)
        message = f"the model '{name[:128]}' is not served here; ask for {served}"
        raise HttpError(404, message, code="model_not_found", param="model")


def _speaking(admit: Admission, names: Mapping[str, str]) -> Admission:
    """`admit`, with its refusals naming the fields as the request does."""

    async def admit_or_refuse() -> Generation:
        try:
            return await admit()
        except RequestError as error:
            ours = error.param or ""
            if ours not in names:
                raise
            message, name = str(error), names[ours]
            if message.startswith(f"{ours} "):
                message = name + message.removeprefix(ours)
            raise RequestError(message, param=name, code=error.code) from None

    return admit_or_refuse


async def _checked(request: Request, schema: type[Body], gateway: Gateway) -> Body:
    _check_content_type(request)
    body = parse(schema, await request.body())
    check_model(body.model, gateway)
    if not gateway.ready and not gateway.draining:
        raise DrainingError("the server is not ready yet; ask again when /ready answers 200")
    return body


def _check_content_type(request: Request) -> None:
    """Takes JSON only: any other type a web page may send to this server without being allowed."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = "the body must be JSON; send the header 'Content-Type: application/json'"
        raise HttpError(415, message, code="unsupported_media_type")

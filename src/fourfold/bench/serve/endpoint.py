"""The server under load: what it is, and one timed request to it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from fourfold.bench.serve.answer import NOT_JSON, Answer, Failure, Usage, error_message
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.http_client import DisconnectError, HttpClient, MalformedError
from fourfold.bench.serve.measure import Outcome
from fourfold.errors import ConfigError

_T = TypeVar("_T")


class Model(msgspec.Struct, frozen=True):
    """An entry of /v1/models."""

    id: str
    owned_by: str = ""


class _Models(msgspec.Struct, frozen=True):
    data: list[Model]


class _Version(msgspec.Struct, frozen=True):
    version: str


class _Reply(msgspec.Struct, frozen=True):
    usage: Usage | None = None


@dataclass(frozen=True)
class Server:
    """What answers: the model asked for, and the software as far as it names itself."""

    model: str
    software: str


class Endpoint:
    """One OpenAI route of one server."""

    def __init__(self, config: ServeBenchConfig, http: HttpClient) -> None:
        self._config = config
        self._http = http
        chat = config.endpoint == "chat"
        self._path = "/v1/chat/completions" if chat else "/v1/completions"

    async def identify(self) -> Server:
        """Finds the model and the server's name. ConfigError where nothing usable answers."""
        status, body = await self._read("GET", "/v1/models")
        if status in (401, 403):
            raise ConfigError(f"{self._config.base_url} refuses the key; give it with --api-key")
        models = _decode(body, _Models) if status == 200 else None
        listed = models.data if models is not None else []
        model = self._config.model or (listed[0].id if listed else None)
        if model is None:
            raise ConfigError(
                f"{self._config.base_url}/v1/models lists no model (HTTP {status}); "
                "name one with --model"
            )
        status, body = await self._read("GET", "/version")
        version = _decode(body, _Version) if status == 200 else None
        owners = [entry.owned_by for entry in listed if entry.id == model]
        words = (*owners, version.version if version is not None else "")
        return Server(model, " ".join(word for word in words if word))

    async def count_prompt(self, request: dict[str, object]) -> tuple[int, int | None, str]:
        """Sends a request unstreamed: its status, the server's count of prompt tokens where it
        gives one, and what it said where it refused."""
        status, body = await self._read("POST", self._path, msgspec.json.encode(request))
        if status != 200:
            return status, None, error_message(body)
        reply = _decode(body, _Reply)
        usage = reply.usage if reply is not None else None
        return status, usage.prompt_tokens if usage is not None else None, ""

    async def ask(self, body: bytes, due: float | None = None) -> Outcome:
        """Sends one streaming request and times its answer. `due` defaults to now."""
        answer = Answer()
        sent = time.perf_counter()
        failure = None
        try:
            async with asyncio.timeout(self._config.timeout):
                answer.close(await self._http.request("POST", self._path, body, answer.feed))
        except TimeoutError as error:
            limit = f"no complete answer in {self._config.timeout:g} s"
            failure = Failure("timeout", str(error) or limit)
        except DisconnectError as error:
            failure = Failure("disconnect", str(error))
        except MalformedError as error:
            failure = Failure("malformed", str(error))
        except OSError as error:
            failure = Failure("connect", str(error))
        tokens = answer.usage.completion_tokens
        return Outcome(
            due=sent if due is None else due,
            sent=sent,
            ended=time.perf_counter(),
            first=answer.first,
            last=answer.last,
            gaps=answer.gaps,
            prompt_tokens=answer.usage.prompt_tokens,
            output_tokens=len(answer.text_times) if tokens is None else tokens,
            counted=tokens is None,
            failure=answer.failure or failure,
        )

    async def _read(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        url = self._config.base_url
        try:
            async with asyncio.timeout(self._config.timeout):
                return await self._http.read(method, path, body)
        except TimeoutError as error:
            raise ConfigError(
                f"{url} gave no answer to {path} in {self._config.timeout:g} s; "
                "see what the server does, or raise --timeout"
            ) from error
        except (OSError, MalformedError) as error:
            raise ConfigError(
                f"{url} cannot be reached ({error}); start the server, or give --base-url"
            ) from error


def _decode(body: bytes, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except NOT_JSON:
        return None

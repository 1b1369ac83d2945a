"""An OpenAI-compatible server that follows a script: the model asked for names the behaviour.

`steady` sends FIRST_S and then GAP_S between tokens. The other models are in `ScriptedServer`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

FIRST_S = 0.06
GAP_S = 0.03
TEMPLATE_TOKENS = 11
TOKENS_PER_WORD = 2


def event(payload: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def text(content: str, finish: str | None = None) -> dict[str, Any]:
    """A chunk that is valid for both routes."""
    choice = {"index": 0, "delta": {"content": content}, "text": content, "finish_reason": finish}
    return {"choices": [choice]}


class ScriptedServer:
    """Runs in a thread; `requests` holds the bodies received, `in_flight_peak` their overlap."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.in_flight = 0
        self.in_flight_peak = 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/version", self.version)
        for route in ("/v1/chat/completions", "/v1/completions"):
            self.app.add_api_route(route, self.answer, methods=["POST"])
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def start(self) -> None:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.socket.close()

    async def models(self) -> object:
        return {"data": [{"id": "steady", "owned_by": "script"}]}

    async def version(self) -> object:
        return {"version": "1.0"}

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        model = body["model"]
        if model == "busy" or (model == "text-only" and isinstance(body.get("prompt"), list)):
            error = {"error": {"message": "try later"}}
            return JSONResponse(error, status_code=429 if model == "busy" else 400)
        if not body.get("stream"):
            usage = {"prompt_tokens": count_prompt(body), "completion_tokens": 1}
            return JSONResponse({"usage": None if model == "no-usage" else usage})
        if model == "html":
            return Response("<html>hello</html>", media_type="text/html")
        stream = getattr(self, f"_{model.replace('-', '_')}", self._steady)
        return StreamingResponse(self._counted(stream(body)), media_type="text/event-stream")

    async def _counted(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.in_flight_peak = max(self.in_flight_peak, self.in_flight)
        try:
            async for piece in stream:
                yield piece
        finally:
            self.in_flight -= 1

    async def _steady(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        # The role of a chat comes at once and is no token.
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(FIRST_S)
        for index in range(body["max_tokens"]):
            if index:
                await asyncio.sleep(GAP_S)
            yield event(text(f" word{index}"))
        yield event(text("", "length"))
        if body["model"] != "no-usage":
            usage = {"prompt_tokens": count_prompt(body), "completion_tokens": body["max_tokens"]}
            yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _split(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Every event in two packets, the second GAP_S after the first."""
        async for whole in self._steady(body):
            yield whole[:9]
            await asyncio.sleep(GAP_S)
            yield whole[9:]

    async def _stream_error(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))
        yield event({"error": {"message": "out of pages"}})
        yield b"data: [DONE]\n\n"

    async def _malformed(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))
        yield b'data: {"choices": [\n\n'

    async def _half_a_character(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))
        yield b'data: {"choices": [{"text": "\xc3"}]}\n\n'

    async def _unfinished(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))

    async def _disconnect(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))
        raise RuntimeError("the script says so")

    async def _hang(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(text("once"))
        await asyncio.sleep(60)


def count_prompt(body: dict[str, Any]) -> int:
    """Ids count as they are; words by a made-up tokenizer with a chat template."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    if isinstance(prompt, list):
        return len(prompt)
    return TEMPLATE_TOKENS + TOKENS_PER_WORD * len(prompt.split())

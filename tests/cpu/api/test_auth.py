"""API keys: on every path but two, existing or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from fourfold.api.config import ApiConfig
from fourfold.errors import ConfigError
from tests.cpu.api.conftest import Server

CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/default"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("GET", "/"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("OPTIONS", "/v1/models"),
    ("DELETE", "/v1/chat/completions"),
]
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer"},
    {"authorization": "one"},
    {"authorization": "Basic one"},
    {"authorization": "Bearer on"},
    {"authorization": "Bearer one two"},
    {"authorization": "Bearer \u00e9"},
    {"x-api-key": "one"},
]


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    from tests.cpu.api.conftest import running_server
    from tests.cpu.api.fakes import FakeGateway

    with running_server(FakeGateway(), ApiConfig(port=0, api_key=("one", "two"))) as server:
        yield server


@pytest.fixture
def client(locked: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.base_url) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_without_a_key_every_path_is_401(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("headers", WRONG)
def test_wrong_keys(client: httpx.Client, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    assert client.get("/v1/models", headers=raw).status_code == 401


def test_two_authorization_headers_are_refused(client: httpx.Client) -> None:
    headers = [("authorization", "Bearer one"), ("authorization", "Bearer wrong")]
    assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("authorization", ["Bearer one", "Bearer two", "bearer two"])
def test_any_of_the_keys_opens(client: httpx.Client, authorization: str) -> None:
    headers = {"authorization": authorization}
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/nowhere", headers=headers).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_load_balancer_needs_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200
    assert client.head(path).status_code == 200


def test_a_large_body_without_a_key_is_not_read(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content=b" " * 20_000_000)
    assert response.status_code == 401
    assert response.headers["connection"] == "close"


def test_without_keys_nothing_is_asked(start: Callable[..., Server]) -> None:
    assert httpx.get(f"{start().base_url}/v1/models").status_code == 200


@pytest.mark.parametrize("key", ["", "with space", "caf\u00e9", "new\nline"])
def test_keys_that_no_header_can_hold_are_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        ApiConfig(api_key=(key,))


def test_keys_do_not_show_in_the_options() -> None:
    assert "secret" not in repr(ApiConfig(api_key=("secret",)))

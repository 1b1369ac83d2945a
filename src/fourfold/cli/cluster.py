"""What the `fourfold cluster` commands share: asking a server about its workers."""

from __future__ import annotations

import dataclasses
from typing import Any

from fourfold.errors import ConfigError

_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which server, and what lets us in."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server; a trailing /v1 may be given."""
    api_key: str | None = None
    """Key of the server, if it asks for one (`fourfold serve --api-key`)."""

    def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """The JSON that a server answers. Raises `ConfigError` where it answers something else."""
        import httpx

        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        where = self.url.rstrip("/").removesuffix("/v1") + path
        try:
            answer = httpx.request(method, where, json=body, headers=headers, timeout=_SECONDS)
            content = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"no Fourfold server answers at {self.url}: {error}; give its address with --url"
            ) from None
        if answer.is_error:
            raise ConfigError(f"the server at {self.url} refuses: {_message(content)}")
        return content


def _message(content: Any) -> str:
    try:
        return str(content["error"]["message"])
    except (KeyError, TypeError):
        return str(content)

"""API keys, checked before anything else of a request is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold.api.errors import HttpError
from fourfold.api.limits import refuse_unread

_OPEN_PATHS = ("/health", "/ready")
"""What a load balancer asks, which has no key."""


class RequireKey:
    """Answers 401 on every path but the open ones, existing or not, unless a key is shown."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app for who may, with the body still unread."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS and not self._known(scope):
            headers = {"www-authenticate": 'Bearer realm="fourfold"'}
            message = "a valid API key is required; send the header 'Authorization: Bearer KEY'"
            error = HttpError(401, message, code="invalid_api_key", headers=headers)
            await refuse_unread(error, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(shown) != 1:
            return False
        scheme, _, key = shown[0].partition(b" ")
        digest = _digest(key.strip())
        # A list, so that every key is compared whichever matches.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    # Digests have one length: compare_digest tells the length of what it compares.
    return hashlib.sha256(key).digest()

"""What is decided before a request is read: who asks, and whether there is room."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tda_lightning.serve.access import host_is_local, token_is_right
from tda_lightning.serve.refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Of every answer: nothing is kept by browsers, guessed from content, or shown in frames.
HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

_ALWAYS = ("/", "/health")  # take no time, and monitors ask when there are many requests
_HEADER_BYTES = 1 << 14
_DRAINED_BYTES, _DRAINED_SECONDS = 1 << 20, 1.0


def as_json(content: object) -> bytes:
    """JSON in ASCII: a text may hold halves of characters, which UTF-8 has no bytes for."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False).encode("ascii")


class Gate:
    """Lets requests through to an application.

    Args:
        application: answers them.
        token: that they must show; "" for none, and then only those to this machine's own names.
        waiting: requests that may be inside at one time.
    """

    def __init__(self, application: Application, token: str, waiting: int) -> None:
        self._application = application
        self._token = token
        self._waiting = waiting
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        try:
            self._require_allowed(scope)
        except Refusal as refusal:
            await _refuse(refusal, receive, send)
            return
        self._inside += 1
        try:
            await self._application(scope, receive, send)
        finally:
            self._inside -= 1

    def _require_allowed(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADER_BYTES:
            raise Refusal(431, f"The headers of a request may have {_HEADER_BYTES} bytes.")
        if not self._token:
            if not host_is_local(headers.get(b"host", b"")):
                raise Refusal(403, "This service answers to localhost and 127.0.0.1 only.")
        # The page is the same for everybody; what it shows, it asks for with the token.
        elif scope["path"] != "/" and not token_is_right(
            headers.get(b"authorization", b""), self._token
        ):
            raise Refusal(401, "Show the token: Authorization: Bearer TOKEN.")
        if self._inside >= self._waiting and scope["path"] not in _ALWAYS:
            raise Refusal(429, f"{self._inside} requests are waiting. Ask again in a moment.")


async def _drain(receive: Receive) -> None:
    """Take what little of a request is still on its way: a connection that is closed before that
    is reset, and the client may never see the answer."""
    left = _DRAINED_BYTES
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAINED_SECONDS)
    extra = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
    headers = {
        "content-type": "application/json",
        **HEADERS,
        **extra.get(refusal.status, {}),
        # There may be more of the request, so the connection is not used again.
        "connection": "close",
    }
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": as_json({"error": refusal.message})})

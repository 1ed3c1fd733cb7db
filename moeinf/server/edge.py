"""What is decided before the application sees a request: who asks, in what form, how much.

A web page that a person on this machine visits can send requests to it. So a server without a key
answers only to names of this machine in `Host`, and a body must be declared as JSON: a browser
sends neither for a page of another origin.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from moeinf.server.errors import Refused
from moeinf.server.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
ROUTES = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
OPEN_ROUTES = {"/", "/health"}  # the page has no data, and a load balancer has no key


class Edge:
    """An ASGI application around the application. The body that it passes on is complete."""

    def __init__(self, app: Any, settings: Settings, count: Callable[[str, int], None]):
        self._app = app
        self._settings = settings
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        counted = self._counting(scope["path"], send)
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except Refused as refused:
            await answer(refused)(scope, receive, counted)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), counted)

    def _counting(self, path: str, send: Send) -> Send:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(path if path in ROUTES else "other", message["status"])
            await send(message)

        return counted

    def _check(self, scope: Scope, headers: dict[str, bytes]) -> None:
        settings, key = self._settings, self._settings.api_key
        host = headers.get("host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if key is None and name not in LOCAL_NAMES | {settings.host}:
            raise Refused(
                400, f"Host: expected a name of this machine, found {host!r:.100}", code="bad_host"
            )
        if key is not None and scope["path"] not in OPEN_ROUTES:
            scheme, _, given = headers.get("authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, key.encode()):
                raise Refused(401, "expected the API key of this server", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                found = kind.decode("latin-1")
                raise Refused(415, f"Content-Type: expected application/json, found {found!r:.100}")

    async def _body(self, headers: dict[str, bytes], receive: Receive) -> bytes | None:
        """None where the client left before it had sent all of it."""
        limit, seconds = self._settings.body_bytes, self._settings.body_seconds
        if int(headers.get("content-length", b"0")) > limit:
            raise _too_large(limit)
        try:
            return await asyncio.wait_for(_read(receive, limit), seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not come within {seconds:g} s") from None


async def _read(receive: Receive, limit: int) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once; what comes after it is the client's leaving."""
    parts = [body]

    async def replayed() -> MutableMapping[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replayed


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body has more than {limit} bytes", code="body_too_large")


def answer(refused: Refused) -> JSONResponse:
    """The response that says why."""
    return JSONResponse(refused.body(), refused.status, headers=refused.headers())

"""Connections that are slow, broken or too many: what uvicorn leaves open.

connected --a request's head--> answering --done--> idle (uvicorn closes it after 5 s)
    |                              |
    `-too slow: 408, closed        `-takes nothing of the answer for a while: cut off
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeinf.server.errors import Refused
from moeinf.server.settings import Settings

LINGER_SECONDS = 2.0
MOST_EARLY_BYTES = 1 << 16
PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


def protocol_for(settings: Settings) -> type[H11Protocol]:
    """uvicorn makes connections of a class, without arguments of ours."""
    return type("Protocol", (_Protocol,), {"settings": settings})


class _Protocol(H11Protocol):
    settings: Settings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refused = False
        self._early = 0  # bytes that came before the answer to the last request was over

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            self._refuse(503, "too many connections: try again")
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self._deadline, self._stalled)):
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # uvicorn keeps what a client sends during an answer, without a limit.
        self._early = self._early + len(data) if self.conn.their_state is h11.DONE else 0
        if self._early > MOST_EARLY_BYTES:
            self.transport.abort()
        elif not self._refused:
            super().data_received(data)
            if not self._refused:
                self._watch_head()

    def _watch_head(self) -> None:
        """The clock runs while a head is incomplete, or while a refused body still comes."""
        waits = self.conn.their_state is h11.IDLE or (
            self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        )
        if waits != (self._deadline is not None):
            seconds = self.settings.header_seconds if waits else None
            self._set_deadline(seconds, self._too_slow)

    def _too_slow(self) -> None:
        seconds = self.settings.header_seconds
        self._refuse(408, f"the head of the request did not come within {seconds:g} s")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Without the application; an answer that has begun is only cut off.

        The connection stays half open for a moment, because closing it while the client still
        sends would take the answer from it.
        """
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True  # it shall not answer too
            self.cycle.message_event.set()
        body = json.dumps(Refused(status, message).body()).encode()
        head = (
            f"HTTP/1.1 {status} {PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._refused = True
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.abort()
            return
        self._set_deadline(LINGER_SECONDS, self.transport.abort)

    def _set_deadline(self, seconds: float | None, then: Callable[[], None]) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, then)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            seconds = self.settings.stall_seconds
            self._stalled = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

"""The client of one request: what it is told, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from moeinf.server.job import Ended, Event, Failed, Job, Piece
from moeinf.server.scheduler import Scheduler


class Client:
    """Brings a job's events from its thread to the event loop, until the end or until it leaves.

    A client that leaves cancels its job, streaming or not.
    """

    def __init__(self, request: Request, scheduler: Scheduler):
        self._request = request
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: it has left

    def send(self, event: Event) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def begin(self, job: Job) -> bool:
        """Submits the job and waits until a thread has taken it; false if the client left first.

        Nothing has been answered until then, so that a refusal can still be a status.
        """
        self._job = job
        self._scheduler.submit(job)
        self._watch = asyncio.create_task(self._until_it_leaves())
        self._watch.add_done_callback(lambda _: self._scheduler.cancel(job))
        event = await self._next()
        return event is not None

    async def events(self) -> AsyncIterator[Piece | Ended]:
        """All that follows; ends after `Ended`, or where the client has left."""
        try:
            while isinstance(event := await self._next(), Piece):
                yield event
            if isinstance(event, Ended):
                yield event
        finally:
            self._watch.cancel()

    async def _next(self) -> Event | None:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self._watch.cancel()
            raise
        if isinstance(event, Failed):
            self._watch.cancel()
            raise event.error
        return event

    async def _until_it_leaves(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

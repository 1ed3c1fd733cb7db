"""Puts the parts together, listens, and ends in order.

serving --SIGTERM or Ctrl-C--> draining --nothing runs, or too long--> closed
                                  `--a second signal--> closed at once
While draining, requests that run go on; all others, new ones too, get 503.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from moeinf.server.app import build_app
from moeinf.server.generation import Generation
from moeinf.server.metrics import Metrics
from moeinf.server.prompts import Prompts
from moeinf.server.protocol import protocol_for
from moeinf.server.scheduler import Scheduler
from moeinf.server.settings import Settings

CLOSING_SECONDS = 3.0  # for the last bytes of answers, and for threads between two layers


def serve(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    bound: socket.socket,
    on_ready: Callable[[str], None],
) -> None:
    """Serves a model until a signal; tells `on_ready` the address once it listens.

    Raises ValueError for a model that cannot continue a text.
    """
    server = Server(model, tokenizer, settings, on_ready)
    try:
        server.run([bound])
    finally:
        server.scheduler.close(CLOSING_SECONDS)


class Server(uvicorn.Server):
    """uvicorn's own end would stop listening at once, and leave who comes without an answer."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, on_ready: Callable[[str], None]
    ):
        metrics = Metrics(model)
        generation = Generation(model, tokenizer, metrics)
        self.scheduler = Scheduler(generation.run, parallel=settings.parallel, queue=settings.queue)
        metrics.watch(self.scheduler)
        prompts = Prompts(model, tokenizer, settings)
        fingerprint = model.moeinf.cache.store.fingerprint
        super().__init__(
            uvicorn.Config(
                build_app(settings, prompts, self.scheduler, metrics, fingerprint),
                http=protocol_for(settings),
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=int(CLOSING_SECONDS),
            )
        )
        self._drain_seconds = settings.drain_seconds
        self._on_ready = on_ready
        self._until: float | None = None
        self._signals = 0

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal handler takes no locks; the next tick does the rest."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        if self._signals and self._until is None:
            self.scheduler.drain()
            self._until = time.monotonic() + self._drain_seconds
        if self._until is not None and (
            not self.scheduler.running or self._signals > 1 or time.monotonic() > self._until
        ):
            self.scheduler.close(0)
            return True
        return await super().on_tick(counter)

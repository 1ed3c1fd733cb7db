"""Which request runs: a bounded queue, and as many threads as may run at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from moeinf.server.errors import Refused
from moeinf.server.job import Failed, Job, Started

log = logging.getLogger(__name__)
_DRAINING = "the server is shutting down"


class Scheduler:
    """Hands jobs to `run` in the order of their coming.

    run: answers a job in the calling thread, until its end or until it is cancelled.
    parallel: jobs that run at once; each keeps keys and values of its tokens.
    queue: jobs that may wait.
    """

    def __init__(self, run: Callable[[Job], None], *, parallel: int, queue: int):
        self._run = run
        self._limit = queue
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._parallel = parallel
        self._draining = self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"moeinf-{number}", daemon=True)
            for number in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, job: Job) -> None:
        """Raises Refused where the queue is full, or where no more jobs are taken."""
        with self._changed:
            if self._draining:
                raise Refused(503, _DRAINING, code="shutting_down")
            free = self._parallel - len(self._running)
            if len(self._waiting) >= self._limit + free:
                raise Refused(
                    429,
                    f"{len(self._waiting)} requests wait, as many as may: try again",
                    code="queue_full",
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client has left. A job that runs ends before its next token or layer."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self) -> None:
        """Takes no more jobs, and refuses those that wait; those that run go on."""
        with self._changed:
            self._draining = True
            refused, self._waiting = list(self._waiting), deque()
        for job in refused:
            job.send(Failed(Refused(503, _DRAINING, code="shutting_down")))

    def close(self, seconds: float) -> None:
        """Ends what still runs, and the threads; waits for them no longer than that."""
        self.drain()
        with self._changed:
            self._closed = True
            running = list(self._running)
            self._changed.notify_all()
        for job in running:
            job.cancelled = True
            job.send(Failed(Refused(503, _DRAINING, code="shutting_down")))
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.send(Started())
                self._run(job)
            except Exception:
                log.exception("a request failed")
                why = "the model failed; the server's log says how"
                job.send(Failed(Refused(500, why, code="model_failed")))
            finally:
                with self._changed:
                    self._running.discard(job)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._running.add(job)
            return job

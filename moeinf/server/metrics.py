"""What the server tells Prometheus at /metrics: requests, tokens, and the cache below them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from moeinf.cache.statistics import COUNTERS
from moeinf.server.job import Job

WINDOW = 10.0  # seconds that tokens/s are counted over


class Metrics:
    """Thread-safe counters; `text` is what Prometheus reads."""

    def __init__(self, model: Any):
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "moeinf_requests", "Requests by route and status", ["route", "status"], registry=own
        )
        self._prompt = Counter(
            "moeinf_prompt_tokens", "Tokens of the prompts that were read", registry=own
        )
        self._generated = Counter("moeinf_generated_tokens", "Tokens written", registry=own)
        self._cancelled = Counter(
            "moeinf_cancelled_requests", "Requests whose client left while they ran", registry=own
        )
        self._first = Histogram(
            "moeinf_first_token_seconds", "From the request to its first token", registry=own
        )
        own.register(_Caches(model.moeinf.caches))
        ProcessCollector(registry=own)
        self._latest: deque[float] = deque(maxlen=100_000)

    def watch(self, scheduler: Any) -> None:
        """Also tells of a scheduler's queue."""
        self._registry.register(_Queue(scheduler, self._latest))

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, status).inc()

    def token(self, job: Job, *, first: bool) -> None:
        """A token has been written."""
        if first:
            self._first.observe(time.perf_counter() - job.asked)
        self._generated.inc()
        self._latest.append(time.monotonic())

    def answered(self, prompt_tokens: int, new_tokens: int, *, cancelled: bool) -> None:
        """A request has ended. A prompt counts once a token has come of it."""
        if new_tokens:
            self._prompt.inc(prompt_tokens)
        if cancelled:
            self._cancelled.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Caches(Collector):
    """The counters of a model's caches, by layer, under the names that vLLM's metrics have too."""

    def __init__(self, caches: list[Any]):
        self._caches = caches

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        counters = [
            CounterMetricFamily(f"moeinf_{name}", f"Experts: {name}.", labels=["cache", "layer"])
            for name in COUNTERS
        ]
        gauges = {
            what: GaugeMetricFamily(f"moeinf_{what}", help, labels=["cache"])
            for what, help in (
                ("hit_rate", "Hits by accesses since the start"),
                ("slots", "Experts that fit into the slots"),
                ("slot_memory_bytes", "Bytes of all slots"),
                ("total_experts", "Experts of the model"),
            )
        }
        for cache in self._caches:
            stats, store = cache.stats(), cache.store
            for layer, counts in enumerate(stats["layers"]):
                for family, name in zip(counters, COUNTERS, strict=True):
                    family.add_metric([cache.name, str(layer)], counts[name])
            values = {
                "hit_rate": stats["hit_rate"],
                "slots": cache.slots,
                "slot_memory_bytes": cache.nbytes,
                "total_experts": store.num_layers * store.num_experts,
            }
            for what, value in values.items():
                gauges[what].add_metric([cache.name], value)
        yield from (*counters, *gauges.values())


class _Queue(Collector):
    def __init__(self, scheduler: Any, latest: deque[float]):
        self._scheduler = scheduler
        self._latest = latest

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "moeinf_requests_running", "Requests that are being answered", self._scheduler.running
        )
        yield GaugeMetricFamily(
            "moeinf_requests_waiting", "Requests in the queue", self._scheduler.waiting
        )
        since = time.monotonic() - WINDOW
        count = sum(when > since for when in list(self._latest))
        what = f"Tokens written a second, over {WINDOW:.0f} s"
        yield GaugeMetricFamily("moeinf_tokens_per_second", what, count / WINDOW)

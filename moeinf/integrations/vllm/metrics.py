"""Counters of the caches in vLLM's metrics: `moeinf_*` at /metrics.

The caches live in vLLM's workers, other processes than the one that answers there. It asks them
when it is asked itself. Several API servers (--api-server-count) keep a registry of their own,
which has none of this: `moeinf top` sees the workers then too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeinf.cache import live
from moeinf.cache.statistics import COUNTERS

BY_LAYER = ("worker", "cache", "layer")
BY_CACHE = BY_LAYER[:2]


class CacheCollector(Collector):
    """Counters of each layer, and the slots of each cache, of this process and those below it."""

    def describe(self) -> list[Metric]:
        """The names alone; without it, Prometheus would ask for the values to learn them."""
        counters, slots = _families()
        return [*counters, slots]

    def collect(self) -> Iterator[Metric]:
        counters, slots = _families()
        for pid in live.running(below=os.getpid()):
            try:
                caches = live.ask(pid)["caches"]
            except OSError:  # a worker that ends
                continue
            for cache in caches:
                one = [str(pid), cache["name"]]
                slots.add_metric(one, cache["slots"])
                for layer, values in enumerate(cache["layers"]):
                    for counter, name in zip(counters, COUNTERS, strict=True):
                        counter.add_metric([*one, str(layer)], values[name])
        yield from (*counters, slots) if slots.samples else ()


def _families() -> tuple[list[CounterMetricFamily], GaugeMetricFamily]:
    counters = [
        CounterMetricFamily(f"moeinf_{name}", f"Experts: {name}.", labels=BY_LAYER)
        for name in COUNTERS
    ]
    return counters, GaugeMetricFamily("moeinf_slots", "Experts kept.", labels=BY_CACHE)


def install() -> None:
    """To be called once in a process."""
    REGISTRY.register(CacheCollector())

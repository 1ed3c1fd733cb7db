"""Several GPUs: one cache on each, for some of the MoE layers, and one RAM tier below all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from moeinf.cache.cache import ExpertCache
from moeinf.cache.host_tier import HostTier
from moeinf.cache.lease import Lease
from moeinf.cache.passes import ForwardPass
from moeinf.cache.recorder import Recorder, RouterSource
from moeinf.cache.statistics import prediction_summary, with_totals
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError

# Counters of the links, which are summed; the others of `host` are those of the one RAM tier.
LINK_COUNTERS = ("demoted_bytes", "copied_bytes", "copies", "gathers")


class CacheGroup:
    """One `ExpertCache` for each GPU, on one `HostTier`. `of(layer)` is the cache of a layer.

    Args:
        store: where all experts can be read from.
        devices: the GPU of each MoE layer, "cuda" or "cuda:N".
        memory, slots: of each GPU, as for `ExpertCache`; a share is of the experts of its layers.
        host_memory, exclusive: of the RAM tier, which is made on the first GPU; or
        tier: one that others share, too.
        dense_bytes: by device, what "auto" leaves for weights loaded later.
        options: passed to each `ExpertCache`.

    Raises:
        UnsupportedError: a layer that lies on no GPU; `priors` or `eamc`, which are of one cache.
        ValueError: not one device for each layer, or see `ExpertCache` and `HostTier`.
    """

    def __init__(
        self,
        store: ExpertStore,
        devices: Sequence[str],
        *,
        host_memory: str | int | None = None,
        exclusive: bool = False,
        tier: HostTier | None = None,
        policy: str = "learned",
        dense_bytes: Mapping[str, int] | None = None,
        **options: Any,
    ):
        if len(devices) != store.num_layers:
            raise ValueError(
                f"expected a device for each of {store.num_layers} MoE layers, found {len(devices)}"
            )
        for layer, device in enumerate(devices):
            if torch.device(device).type != "cuda":
                raise UnsupportedError(
                    f"MoE layer {layer} lies on {device!r}: layers over several devices lie on GPUs"
                )
        for name in ("priors", "eamc"):
            if options.get(name) is not None:
                raise UnsupportedError(f"{name} is of one cache: give one device")
        reader = {
            name: options[name]
            for name in ("reader_threads", "chunk_bytes", "direct")
            if name in options
        }
        if tier is None:
            tier = HostTier(
                store,
                memory=host_memory,
                policy=policy,
                exclusive=exclusive,
                device=devices[0],
                **reader,
            )
        elif host_memory is not None or exclusive:
            raise ValueError("host_memory and exclusive are the tier's own: leave them out")
        self.store = store
        self.tier = tier
        self.devices = list(devices)
        self.caches = {
            device: ExpertCache(
                store,
                device=device,
                tier=tier,
                layers=devices.count(device),
                policy=policy,
                dense_bytes=(dense_bytes or {}).get(device, 0),
                **options,
            )
            for device in dict.fromkeys(devices)
        }
        self.routers: RouterSource | None = None
        self._first = next(iter(self.caches.values()))

    def of(self, layer: int) -> ExpertCache:
        """The cache that serves MoE layer `layer`. Raises ValueError for a layer out of range."""
        if not 0 <= layer < len(self.devices):
            raise ValueError(f"expected a layer in 0..{len(self.devices) - 1}, found {layer}")
        return self.caches[self.devices[layer]]

    @property
    def device(self) -> torch.device:
        """Where the model's first layer computes."""
        return self.of(0).device

    @property
    def slots(self) -> int:
        """Experts that can be resident at once, on all GPUs together."""
        return sum(cache.slots for cache in self.caches.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the cached slots."""
        return sum(cache.nbytes for cache in self.caches.values())

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """See `ExpertCache.acquire`; the slots are those of `of(layer)`."""
        return self.of(layer).acquire(layer, experts)

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[Lease]:
        """See `ExpertCache.waves`."""
        return self.of(layer).waves(layer, experts)

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """See `ExpertCache.prefetch`."""
        return self.of(layer).prefetch(layer, experts)

    def resident(self, layer: int) -> list[int]:
        """See `ExpertCache.resident`."""
        return self.of(layer).resident(layer)

    def begin_pass(self, one: ForwardPass, *, said: bool = True) -> None:
        """See `ExpertCache.begin_pass`."""
        for cache in self.caches.values():
            cache.begin_pass(one, said=said)

    def record(self, *, router: bool = False) -> Recorder:
        """See `ExpertCache.record`."""
        recorder = Recorder(self.store.num_layers, self.store.num_experts, router=router)
        return recorder.start([cache.observers for cache in self.caches.values()], self.routers)

    def stop_recording(self) -> None:
        """See `ExpertCache.stop_recording`."""
        self._first.stop_recording()

    @property
    def is_observed(self) -> bool:
        """See `ExpertCache.is_observed`."""
        return self._first.is_observed

    def stats(self) -> dict[str, Any]:
        """See `ExpertCache.stats`. `layers` are each of its own cache, `host` is of the one tier,
        its link counters are summed, and `devices` holds the statistics of each cache."""
        each = {device: cache.stats() for device, cache in self.caches.items()}
        layers = [dict(each[device]["layers"][i]) for i, device in enumerate(self.devices)]
        host = dict(each[self.devices[0]]["host"])
        for name in LINK_COUNTERS:
            host[name] = sum(stats["host"][name] for stats in each.values())
        return {
            **with_totals(layers),
            "slots": self.slots,
            "policy": self._first.policy,
            "device": ", ".join(cache.device_name for cache in self.caches.values()),
            "host": host,
            "prefetch": self._prediction_stats(),
            "places": each[self.devices[0]]["places"],
            "devices": each,
        }

    def _prediction_stats(self) -> dict[str, Any] | None:
        if self._first.prefetch_kind == "off":
            return None
        each = [cache.core.prediction_stats() for cache in self.caches.values()]
        total = dict(each[0])  # words and shares of time are the first device's
        for name, value in total.items():
            if name not in ("gain", "gain_error") and not isinstance(value, str):
                total[name] = sum(counts[name] for counts in each)
        return prediction_summary(total)

    def reset_stats(self) -> None:
        """See `ExpertCache.reset_stats`."""
        for cache in self.caches.values():
            cache.reset_stats()

"""The caches of a model: one for all experts of one form and size, which share the budget."""

from __future__ import annotations

from typing import Any

import torch

from moeinf.cache.budget import (
    GPU_RESERVE,
    RAM_RESERVE,
    free_bytes,
    less_reserve,
    parse_bytes,
    slots_for,
)
from moeinf.cache.cache import ExpertCache
from moeinf.cache.devices import open_device
from moeinf.cache.group import CacheGroup
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CapacityError, UnsupportedError
from moeinf.integrations.transformers.device_map import Placement


def make_caches(
    stores: list[ExpertStore],
    *,
    device: str | torch.device | None,
    placed: Placement | None,
    dense_bytes: int,
    **options: Any,
) -> list[ExpertCache | CacheGroup]:
    """One cache for each store, on one `device`, or on the several devices of `placed`.

    Most models have one store. Where a model has experts of several sizes (of text and of vision,
    say), slots of one size would waste the memory of the smaller ones. So each has a pool, and the
    budget is shared out by the bytes of the experts.
    """
    if device is None:
        assert placed is not None
        if len(stores) > 1:
            raise UnsupportedError(
                f"the model's experts are of {len(stores)} kinds: give one device"
            )
        return [CacheGroup(stores[0], placed.experts, dense_bytes=placed.dense_bytes, **options)]
    if len(stores) == 1:
        return [ExpertCache(stores[0], device=device, dense_bytes=dense_bytes, **options)]
    caches: list[ExpertCache | CacheGroup] = []
    shares = _share_out(stores, device, dense_bytes, options)
    for i, (store, share) in enumerate(zip(stores, shares, strict=True)):
        share["dense_bytes"] = dense_bytes
        if i:  # these have the shape of the first store's experts
            share = {key: value for key, value in share.items() if key not in ("eamc", "priors")}
        caches.append(ExpertCache(store, device=device, **share))
    return caches


def slots_that_fit(
    stores: list[ExpertStore], device: str | torch.device, dense_bytes: int
) -> list[int]:
    """The slots of each store's cache with memory="auto"; none where one would not fit."""
    slots = []
    shares = _share_out(stores, device, dense_bytes, {"memory": "auto"})
    for store, share in zip(stores, shares, strict=True):
        total = store.num_layers * store.num_experts
        try:
            slots.append(
                slots_for(
                    memory=share["memory"],
                    slots=None,
                    slot_bytes=store.slot_bytes,
                    total_experts=total,
                )
            )
        except CapacityError:
            slots.append(0)
    return slots


def _share_out(
    stores: list[ExpertStore], device: str | torch.device, dense_bytes: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The options of each store's cache: its part of all sizes that are not shares already."""
    opened = open_device(device)
    memory, slots, host_memory = (options.get(key) for key in ("memory", "slots", "host_memory"))
    if memory == "auto" or (memory is None and slots is None and opened is not None):
        reserve = RAM_RESERVE if opened is None else GPU_RESERVE
        memory = max(1, less_reserve(free_bytes(opened), reserve, dense_bytes))
    every = sum(store.nbytes for store in stores)
    shares = []
    for store in stores:
        mine = dict(options)
        for key, size in (("memory", memory), ("host_memory", host_memory)):
            if size is not None and not str(size).strip().endswith("%"):
                mine[key] = max(1, parse_bytes(size) * store.nbytes // every)
        if slots is not None:
            mine["slots"] = max(1, slots * store.nbytes // every)
        shares.append(mine)
    return shares

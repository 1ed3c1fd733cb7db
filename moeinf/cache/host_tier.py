"""A tier in page-locked RAM that several caches share."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from moeinf import _core
from moeinf.cache.budget import RAM_RESERVE, free_bytes, host_slots_for, less_reserve
from moeinf.cache.devices import open_device
from moeinf.checkpoint.store import ExpertStore


class HostTier:
    """RAM between the files and the GPUs, for one or several `ExpertCache`s on the same store.

    An expert is read and pinned once for all of them. It lives as long as any of the caches.

    Args:
        store: where all experts can be read from.
        memory: what it may take, in bytes or as a share of all experts. Without it, all experts, or
            what is available less 2 GiB.
        policy: who leaves when a slot is needed; one of `moeinf.policies()`.
        exclusive: an expert on a GPU need not sit here too. One that the last GPU evicts comes
            here.
        device: the GPU whose driver page-locks the memory, for all GPUs.
        reader_threads, chunk_bytes: of the file reader; 0 takes the measured defaults.
        direct: read past the page cache where the file system allows it.

    Raises:
        CapacityError: the memory is below one slot, or cannot be had.
        UnsupportedError: the device cannot be used here.
        ValueError: an unknown policy, or a size that makes no sense.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        memory: str | int | None = None,
        policy: str = "learned",
        exclusive: bool = False,
        device: str | torch.device = "cuda",
        reader_threads: int = 0,
        chunk_bytes: int = 0,
        direct: bool = True,
    ):
        opened = open_device(device)
        if opened is None:
            raise ValueError(f"device={str(device)!r}: a RAM tier serves GPUs: give one of them")
        self.store = store
        self.core = _core.HostTier(
            store.catalog,
            opened,
            host_slots_for(
                host_memory=memory,
                slots=0,
                slot_bytes=store.slot_bytes,
                total_experts=store.num_layers * store.num_experts,
                available=less_reserve(free_bytes(None), RAM_RESERVE),
                exclusive=exclusive,
            ),
            policy,
            exclusive=exclusive,
            threads=reader_threads,
            chunk_bytes=chunk_bytes,
            direct=direct,
        )
        store.check_unchanged()
        warn_of_refused_slots(self.stats())

    def stats(self) -> dict[str, Any]:
        """slots, slots_refused, hits, misses, read_bytes (from files), demoted (from GPUs)."""
        counts: dict[str, Any] = self.core.stats()
        return counts

    def reset_stats(self) -> None:
        """Sets every counter to zero."""
        self.core.reset_stats()


def warn_of_refused_slots(counts: dict[str, Any]) -> None:
    """Says so where less RAM could be page-locked than was asked for."""
    if counts["slots_refused"]:
        warnings.warn(
            f"host_memory: page-locked RAM for {counts['slots'] + counts['slots_refused']} experts "
            f"was refused; {counts['slots']} are kept there, the others are read from the files",
            stacklevel=4,
        )

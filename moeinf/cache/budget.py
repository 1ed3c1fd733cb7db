"""The memory budget of experts: bytes, a share of all experts, or "auto"."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from moeinf import _core
from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CapacityError
from moeinf.share import share_of

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}

# Extra slots of an exclusive RAM tier. An expert on its way between GPU and RAM takes a slot in
# both, and a decode step may bring in and evict about this many.
UNDER_WAY = 16

# Memory that "auto" leaves free: for activations and a longer context on a GPU, for all other use
# in RAM. At most half of the free memory.
GPU_RESERVE = 2**30
RAM_RESERVE = 2 * 2**30


def free_bytes(device: _core.CudaDevice | None) -> int:
    """What can be taken of a GPU's memory; of RAM without one. Every judgement of memory asks here.

    Of RAM: what the system and its control groups leave, less what caches have but never used.
    """
    free: int = _core.available_memory() if device is None else device.free_bytes
    return free


def bytes_loaded_as(dtype: torch.dtype, tensors: Collection[TensorEntry]) -> int:
    """Bytes that the tensors take while they are loaded: converted, and the largest one as it is
    stored too."""
    bits = 8 * dtype.itemsize
    loaded = [
        entry.nbytes * max(1, bits // (entry.bits or 8)) if entry.bits else entry.nbytes
        for entry in tensors
    ]
    return sum(loaded) + max((entry.nbytes for entry in tensors), default=0)


def check_fits(slots: int, slot_bytes: int, dense_bytes: int, free: int) -> None:
    """Raises CapacityError if slots and other weights do not fit into free bytes together."""
    needed = (slots + _core.ExpertCache.staging_slots) * slot_bytes
    if needed + dense_bytes > free:
        raise CapacityError(
            f"{slots} slots and two staging slots take {needed:,} bytes, other weights "
            f"{dense_bytes:,}; {free:,} bytes are available: give a smaller memory or slots"
        )


def parse_bytes(text: str | int) -> int:
    """`"2GiB"`, `"512 MB"` or a number of bytes.

    Raises:
        ValueError: not a size above zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value: float = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"{text!r} is not a size such as 2GiB, 512MiB or 25%")
        value = float(match[1]) * UNITS[match[2].lower()]
    if value < 1:
        raise ValueError(f"{text!r} is not a size above zero")
    return int(value)


def slots_for(
    *,
    memory: str | int | None,
    slots: int | None,
    slot_bytes: int,
    total_experts: int,
    free: int | None = None,
) -> int:
    """The number of cached slots that a budget gives.

    A share such as `"25%"` is a share of all experts, rounded to the nearest count. Bytes pay for
    the slots and for the two staging slots. "auto" means `free` bytes. Without a budget, every
    expert is resident.

    Raises:
        ValueError: both are given, or one makes no sense.
        CapacityError: the budget is below one slot.
    """
    if memory is not None and slots is not None:
        raise ValueError("give memory or slots, not both")
    if slots is not None:
        if type(slots) is not int or slots < 1:
            raise ValueError(f"slots={slots!r}: expected a count of at least 1")
        return min(slots, total_experts)
    if memory is None:
        return total_experts
    if memory == "auto":
        if free is None:
            raise ValueError("memory='auto': it is not known what is free")
        budget = free
    elif isinstance(memory, str) and memory.strip().endswith("%"):
        return _share(memory, total_experts)
    else:
        budget = parse_bytes(memory)
    if budget < slot_bytes:
        raise CapacityError(
            f"memory={memory!r} is {budget:,} bytes, below one slot of {slot_bytes:,} bytes"
        )
    count = budget // slot_bytes
    if count >= total_experts:
        return total_experts
    return max(1, count - _core.ExpertCache.staging_slots)


def less_reserve(free: int, reserve: int, taken: int = 0) -> int:
    """What "auto" may use of `free` bytes of which others will soon take `taken`."""
    left = max(free - taken, 0)
    return max(left - reserve, left // 2)


def host_slots_for(
    *,
    host_memory: str | int | None,
    slots: int,
    slot_bytes: int,
    total_experts: int,
    available: int,
    exclusive: bool,
) -> int:
    """The number of slots of the RAM tier below `slots` slots of GPU memory.

    `host_memory` is bytes or a share of all experts. Without it, every expert that the tier can be
    asked for, or as many as fit in `available` bytes: an exclusive tier is not asked for what
    already sits above it, but for what is under way between the two.

    Raises:
        ValueError: it makes no sense.
        CapacityError: it is below one slot.
    """
    useful = total_experts
    if exclusive:
        useful = min(total_experts, total_experts - slots + UNDER_WAY)
    if host_memory is None:
        count = available // slot_bytes
    elif isinstance(host_memory, str) and host_memory.strip().endswith("%"):
        count = _share(host_memory, total_experts, "host_memory")
    else:
        count = parse_bytes(host_memory) // slot_bytes
    if count < 1:
        budget = f"{available:,} bytes of RAM" if host_memory is None else repr(host_memory)
        raise CapacityError(f"host_memory: {budget} is below one slot of {slot_bytes:,} bytes")
    return min(count, useful)


def _share(text: str, total_experts: int, name: str = "memory") -> int:
    count = share_of(text, total_experts)
    if count < 1:
        raise CapacityError(f"{name}={text!r} of {total_experts} experts is below one slot")
    return count

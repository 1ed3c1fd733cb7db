"""How much fast memory experts may take, said in bytes or as a share of all experts."""

from __future__ import annotations

import re

from moeinf.errors import CapacityError

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

# Slots beyond the cached ones, through which experts stream that a step needs and no slot can keep.
TRANSIT_SLOTS = 2


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
) -> int:
    """The number of cached slots that a budget gives.

    A share such as `"25%"` is of all experts, rounded to the nearest count; bytes pay for the
    slots and for the two that experts stream through. Without either, everything is resident.

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
    if isinstance(memory, str) and memory.strip().endswith("%"):
        return _share(memory, total_experts)
    budget = parse_bytes(memory)
    if budget < slot_bytes:
        raise CapacityError(
            f"memory={memory!r} is {budget:,} bytes, below one slot of {slot_bytes:,} bytes"
        )
    count = budget // slot_bytes
    if count >= total_experts:
        return total_experts
    return max(1, count - TRANSIT_SLOTS)


def _share(text: str, total_experts: int) -> int:
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        raise ValueError(f"{text!r} is not a share such as 25%") from None
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is not a share between 0% and 100%")
    count = int(share * total_experts + 0.5)
    if count < 1:
        raise CapacityError(f"memory={text!r} of {total_experts} experts is below one slot")
    return count

"""A budget in bytes or as a share becomes a count of slots."""

from __future__ import annotations

import pytest

from moeinf.cache.budget import GPU_RESERVE, host_slots_for, less_reserve, parse_bytes, slots_for
from moeinf.errors import CapacityError


@pytest.mark.parametrize(
    "text, expected",
    [("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("512", 512), ("3kb", 3000), ("4G", 2**32), (77, 77)],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 bananas", "0", 0, -5, True, "1e9", "nan"])
def test_sizes_that_make_no_sense(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "memory, expected",
    [
        ("25%", 25),
        ("0.5%", 1),
        ("100%", 100),
        (4096 * 12, 10),  # two slots' worth is kept to stream through
        (4096, 1),
        (4096 * 100, 100),
        ("1GiB", 100),
        (None, 100),
    ],
)
def test_slots_of_a_budget(memory: str | int | None, expected: int) -> None:
    assert slots_for(memory=memory, slots=None, slot_bytes=4096, total_experts=100) == expected


@pytest.mark.parametrize("memory", ["0%", "101%", "x%", "%"])
def test_shares_that_make_no_sense(memory: str) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        slots_for(memory=memory, slots=None, slot_bytes=4096, total_experts=100)


@pytest.mark.parametrize("memory", [4095, "0.4%"])
def test_a_budget_below_one_slot(memory: str | int) -> None:
    with pytest.raises(CapacityError, match="below one slot"):
        slots_for(memory=memory, slots=None, slot_bytes=4096, total_experts=100)


@pytest.mark.parametrize("slots", [0, -1, 1.5])
def test_counts_that_make_no_sense(slots: int) -> None:
    with pytest.raises(ValueError, match="expected a count"):
        slots_for(memory=None, slots=slots, slot_bytes=4096, total_experts=100)


def test_one_budget_at_a_time() -> None:
    with pytest.raises(ValueError, match="not both"):
        slots_for(memory="1GiB", slots=3, slot_bytes=4096, total_experts=100)


@pytest.mark.parametrize("free, expected", [(4096 * 12, 10), (4096, 1), (4096 * 200, 100)])
def test_what_is_free_is_a_budget(free: int, expected: int) -> None:
    count = slots_for(memory="auto", slots=None, slot_bytes=4096, total_experts=100, free=free)
    assert count == expected


@pytest.mark.parametrize("free", [0, 4095])
def test_too_little_is_free(free: int) -> None:
    with pytest.raises(CapacityError, match="below one slot"):
        slots_for(memory="auto", slots=None, slot_bytes=4096, total_experts=100, free=free)


def test_a_reserve_is_left_free_but_never_more_than_half() -> None:
    assert less_reserve(10 * GPU_RESERVE, GPU_RESERVE) == 9 * GPU_RESERVE
    assert less_reserve(10 * GPU_RESERVE, GPU_RESERVE, taken=4 * GPU_RESERVE) == 5 * GPU_RESERVE
    assert less_reserve(GPU_RESERVE, GPU_RESERVE) == GPU_RESERVE // 2
    assert less_reserve(1, GPU_RESERVE, taken=5) == 0


@pytest.mark.parametrize(
    "host_memory, exclusive, expected",
    [
        (None, False, 60),  # what is available
        (None, True, 60),
        ("25%", False, 25),
        ("100%", False, 100),
        ("100%", True, 86),  # the other 14 sit above
        (4096 * 5, False, 5),
        ("1GiB", True, 86),
    ],
)
def test_slots_of_the_ram_tier(
    host_memory: str | int | None, exclusive: bool, expected: int
) -> None:
    count = host_slots_for(
        host_memory=host_memory,
        slots=30,
        slot_bytes=4096,
        total_experts=100,
        available=60 * 4096,
        exclusive=exclusive,
    )
    assert count == expected


@pytest.mark.parametrize("host_memory, available", [(4095, 10**9), ("0.1%", 10**9), (None, 4095)])
def test_a_ram_tier_below_one_slot(host_memory: str | int | None, available: int) -> None:
    with pytest.raises(CapacityError, match=r"host_memory.*below one slot"):
        host_slots_for(
            host_memory=host_memory,
            slots=30,
            slot_bytes=4096,
            total_experts=100,
            available=available,
            exclusive=False,
        )

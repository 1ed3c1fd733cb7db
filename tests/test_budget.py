"""A budget in bytes or as a share becomes a count of slots."""

from __future__ import annotations

import pytest

from moeinf.budget import parse_bytes, slots_for
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

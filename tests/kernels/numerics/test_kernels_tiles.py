"""Tiles of the prefill kernels against slow Python: the rows of each slot, in order, cut evenly."""

from __future__ import annotations

import random

import pytest
import torch
from layers import DEVICE

from moeinf.kernels.tiles import LONGEST, make_tiles


def cut(slots: list[int], rows: int) -> list[tuple[int, list[int]]]:
    """(slot, its next rows at most) for every slot that a route reads."""
    found = []
    for slot in sorted({slot for slot in slots if slot >= 0}):
        own = [r for r, at in enumerate(slots) if at == slot]
        found += [(slot, own[i : i + rows]) for i in range(0, len(own), rows)]
    return found


@pytest.mark.parametrize("R", [1, 2, 17, 100, 700, LONGEST + 900])
@pytest.mark.parametrize("num_slots", [1, 3, 40, 5000])
@pytest.mark.parametrize("mapped", [False, True])
def test_tiles_hold_each_present_route_once_in_order(
    R: int, num_slots: int, mapped: bool, seed: int
) -> None:
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = draw.choice((torch.int32, torch.int64))
    ids = torch.randint(-1, min(num_slots, draw.choice((1, 8, 64))), (R,), generator=rng)
    expert_map, slots = None, ids.tolist()
    if mapped:
        expert_map = torch.randint(-1, num_slots, (64,), generator=rng)
        slots = [-1 if e < 0 else int(expert_map[e]) for e in slots]
        expert_map = expert_map.to(draw.choice((torch.int32, torch.int64))).to(DEVICE)
    rows = draw.choice((16, 32, 64, 128))
    tiles = make_tiles(ids.to(dtype).to(DEVICE), expert_map, num_slots, rows)
    order, first, end = tiles.order.tolist(), tiles.first.tolist(), tiles.end.tolist()
    found = [
        (slot, order[first[i] : end[i]]) for i, slot in enumerate(tiles.slot.tolist()) if slot >= 0
    ]
    assert found == cut(slots, rows)
    assert tiles.keys.tolist() == slots

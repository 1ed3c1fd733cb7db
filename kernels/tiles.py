"""Which rows each program of the prefill kernels takes: routes sorted by slot, cut into tiles.

A tile holds rows of one expert only, always the same ones, whatever slot the expert is in and
whatever else the wave holds. Computed on the device of the ids; never waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Which rows each tile takes: all tensors on the device of the ids.

    | field | shape, dtype | meaning |
    |---|---|---|
    | order | [R] int32 | routes sorted by slot, stable; absent routes last |
    | slot | [tiles] int32 | the slot of each tile, -1 for a surplus tile |
    | first | [tiles] int32 | where the tile's rows begin in `order` |
    | end | [tiles] int32 | where the rows of the tile's slot end in `order` |
    """

    order: torch.Tensor
    slot: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


def make_tiles(slots: torch.Tensor, num_slots: int, block_rows: int) -> Tiles:
    """Tiles of `block_rows` rows over the routes `slots` [R] (int64, -1 = absent), with no sync.

    The number of tiles is the bound floor(R / block_rows) + min(R, num_slots); those beyond the
    need carry slot -1.
    """
    key = torch.where(slots < 0, num_slots, slots)
    ordered, order = torch.sort(key, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(num_slots + 1, device=slots.device))
    tiles = (edges[1:] - edges[:-1] + block_rows - 1) // block_rows
    ends = torch.cumsum(tiles, 0)
    bound = slots.numel() // block_rows + min(slots.numel(), num_slots)
    tile = torch.arange(bound, device=slots.device)
    slot = torch.searchsorted(ends, tile, right=True)
    used = slot < num_slots
    slot = slot.clamp(max=num_slots - 1)
    first = edges[slot] + (tile - ends[slot] + tiles[slot]) * block_rows
    return Tiles(
        order=order.int(),
        slot=torch.where(used, slot, -1).int(),
        first=first.int(),
        end=edges[slot + 1].int(),
    )

# mypy: ignore-errors
"""Which rows each program of the prefill kernels takes: routes sorted by slot, cut into tiles.

A tile holds rows of one expert only, always the same ones, whatever slot the expert is in and
whatever else the wave holds. Computed on the device of the ids; never waits for the host. Two
kernels and torch's sort: the same in operators of torch was 40 launches more, which took the host
longer than the products of 4096 tokens take an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .lookup import slot_of

KEYS = 1024  # routes of a program of write_keys
LONGEST = 4096  # routes that write_tiles takes at a time; more of them spill


@dataclass(frozen=True)
class Tiles:
    """Which rows each tile takes: all tensors on the device of the ids.

    | field | shape, dtype | meaning |
    |---|---|---|
    | keys | [R] int32 | the slot of each route, -1 for absent routes |
    | order | [R] int64 | routes sorted by slot, stable; absent routes first |
    | slot | [tiles] int32 | the slot of each tile, -1 for a surplus tile |
    | first | [tiles] int32 | where the tile's rows begin in `order` |
    | end | [tiles] int32 | where the tile's rows end in `order` |
    """

    keys: torch.Tensor
    order: torch.Tensor
    slot: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


@triton.jit(do_not_specialize=["R"])
def write_keys(keys_ptr, ids_ptr, map_ptr, R, BLOCK: tl.constexpr):
    """keys[r] = the slot of route r, or -1 where it is absent. Grid (ceil(R / BLOCK),)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = slot_of(ids_ptr, map_ptr, r, r < R)
    tl.store(keys_ptr + r, tl.maximum(slot, -1).to(tl.int32), mask=r < R)


@triton.jit(do_not_specialize=["R", "tiles"])
def write_tiles(
    keys_ptr, starts_ptr, slot_ptr, first_ptr, end_ptr, R, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cuts each run of equal keys into tiles of ROWS rows. Grid (1,).

    | argument | shape, dtype | meaning |
    |---|---|---|
    | keys | [R] int32 | sorted |
    | starts | [R] int32 | room to work in: where each run begins |
    | slot, first, end | [tiles] int32 | written: see Tiles |

    One program walks along the keys, BLOCK at a time. What it wrote it reads after a barrier.
    """
    runs = 0
    made = 0
    for p0 in range(0, R, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + p, mask=p < R, other=-1)
        before = tl.load(keys_ptr + p - 1, mask=(p > 0) & (p < R), other=-1)
        after = tl.load(keys_ptr + p + 1, mask=p + 1 < R, other=-1)
        present = key >= 0
        begins = present & (key != before)
        run = runs + tl.cumsum(begins.to(tl.int32), axis=0) - 1
        tl.store(starts_ptr + run, p, mask=begins)
        tl.debug_barrier()
        start = tl.load(starts_ptr + run, mask=present, other=0)
        opens = present & ((p - start) % ROWS == 0)
        tile = made + tl.cumsum(opens.to(tl.int32), axis=0) - 1
        tl.store(slot_ptr + tile, key, mask=opens)
        tl.store(first_ptr + tile, p, mask=opens)
        tl.store(end_ptr + tile, p + ROWS, mask=opens)
        tl.debug_barrier()
        # The last tile of a run may be shorter.
        tl.store(end_ptr + tile, p + 1, mask=present & (key != after))
        runs += tl.sum(begins.to(tl.int32), axis=0)
        made += tl.sum(opens.to(tl.int32), axis=0)
    for q0 in range(0, tiles, BLOCK):
        q = q0 + tl.arange(0, BLOCK)
        tl.store(slot_ptr + q, -1, mask=(q >= made) & (q < tiles))


def make_tiles(
    ids: torch.Tensor, expert_map: torch.Tensor | None, num_slots: int, block_rows: int
) -> Tiles:
    """Tiles of `block_rows` rows over the routes `ids` [R] (int32 or int64), with no sync.

    Ids are slots, or experts whose slots `expert_map` names; -1 is absent. The number of tiles is
    the bound floor(R / block_rows) + min(R, num_slots); those beyond the need carry slot -1.
    """
    R = ids.numel()
    keys, starts = torch.empty(2, R, dtype=torch.int32, device=ids.device)
    write_keys[(triton.cdiv(R, KEYS),)](keys, ids, expert_map, R, BLOCK=KEYS)
    ordered, order = torch.sort(keys, stable=True)
    bound = R // block_rows + min(R, num_slots)
    slot, first, end = torch.empty(3, bound, dtype=torch.int32, device=ids.device)
    block = min(max(triton.next_power_of_2(R), 128), LONGEST)
    write_tiles[(1,)](
        ordered, starts, slot, first, end, R, bound, ROWS=block_rows, BLOCK=block,
        num_warps=16 if block > 1024 else 4,
    )  # fmt: skip
    return Tiles(keys, order, slot, first, end)

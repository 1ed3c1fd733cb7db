# mypy: ignore-errors
"""What every kernel asks first: which slot a route reads.

Called inside the other kernels only. Never launches anything and never touches the host.
"""

import triton
import triton.language as tl


@triton.jit
def slot_of(ids_ptr, map_ptr, r, mask):
    """The slot of route(s) `r` as int64, -1 where the route is masked off or its expert is absent.

    | argument | shape, dtype | meaning |
    |---|---|---|
    | ids_ptr | [R] int32 or int64 | slot ids, or expert ids where there is a map |
    | map_ptr | [E] int32 or int64, or None | expert id -> slot or -1 |
    """
    slot = tl.load(ids_ptr + r, mask=mask, other=-1).to(tl.int64)
    if map_ptr is not None:
        known = mask & (slot >= 0)
        slot = tl.load(map_ptr + tl.maximum(slot, 0), mask=known, other=-1).to(tl.int64)
    return slot

# mypy: ignore-errors
"""What every kernel asks first: which slot a route reads, and where that slot's bytes begin.

Called inside the other kernels only. Never launches anything and never touches the host.
"""

import triton
import triton.language as tl


@triton.jit
def slot_of(ids_ptr, map_ptr, r, mask, HAS_MAP: tl.constexpr):
    """The slot of route(s) `r` as int64, -1 where the route is masked off or its expert is absent.

    | argument | shape, dtype | meaning |
    |---|---|---|
    | ids_ptr | [R] int32 or int64 | slot ids, or expert ids when HAS_MAP |
    | map_ptr | [E] int32 or int64 | expert id -> slot or -1; read only when HAS_MAP |
    """
    slot = tl.load(ids_ptr + r, mask=mask, other=-1).to(tl.int64)
    if HAS_MAP:
        known = mask & (slot >= 0)
        slot = tl.load(map_ptr + tl.maximum(slot, 0), mask=known, other=-1).to(tl.int64)
    return slot


@triton.jit
def segment_base(segment_ptr, slot, stride_s, source, READ_THROUGH: tl.constexpr):
    """Pointer(s) to a segment: in its slot, or at the address `source` where that is not 0.

    Addresses are int64 throughout, for slot * stride passes 2^31 in any real pool.
    """
    if READ_THROUGH:
        size: tl.constexpr = segment_ptr.dtype.element_ty.primitive_bitwidth // 8
        inside = segment_ptr.to(tl.int64) + slot * stride_s * size
        address = tl.where(source != 0, source, inside).to(segment_ptr.dtype)
        # 16-byte alignment is checked on the host; saying so here keeps the loads 16 bytes wide.
        base = tl.multiple_of(address, 16)
    else:
        base = segment_ptr + slot * stride_s
    return base

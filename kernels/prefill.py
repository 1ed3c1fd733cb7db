# mypy: ignore-errors
# ruff: noqa: E741 - I is the size of the index i, as in every table here.
"""Many tokens: one grouped matrix product over all experts, on the tensor cores.

The rows of a tile (see tiles.py) belong to one expert. `gate_up_grouped` gathers token rows as it
reads them and `down_grouped` scatters its rows back to their routes, so that `combine` can add them
in the order of the router.
"""

import triton
import triton.language as tl

from .activations import activate
from .product import multiply


@triton.jit
def place(tiles, columns, GROUP: tl.constexpr):
    """This program's (tile, column block): GROUP tiles share a column block while it is in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    first = group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = pid - first * columns
    return first + within % size, within // size


@triton.jit(do_not_specialize=["tiles"])
def gate_up_grouped(
    hidden_ptr, gate_up_ptr, bias_ptr, act_ptr, order_ptr, slot_ptr, first_ptr, end_ptr,
    tiles, top_k, H, I, stride_ht, stride_gs, stride_gn, stride_gh, stride_bs, alpha, limit,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act[m, i] = activation(gate_up[slot(m), :, :] @ hidden[t(m)]) for sorted rows m.

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | hidden | [T, H] | W | (stride_ht, 1) | tokens |
    | gate_up | [S, N, H] | W | (stride_gs, stride_gn, stride_gh) | N is 2I, or I when not GATED |
    | bias | [S, N] | W/float32 | (stride_bs, 1) | read when HAS_BIAS |
    | act | [R, I] | W | contiguous | rows in sorted order |
    | order, slot, first, end | [R], 3 x [tiles] | int32 | contiguous | see Tiles |

    Grid (tiles * ceil(I / BLOCK_I),). Bytes: N * H * sizeof(W) per distinct slot at best, H and I
    per row; FLOPs: 2 * N * H per present route.

    A program multiplies BLOCK_M gathered token rows with BLOCK_I rows of gate and of up and applies
    the activation before it writes. Programs that share weights run side by side.
    """
    tile, column = place(tiles, tl.cdiv(I, BLOCK_I), GROUP)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot >= 0:
        PAIRED: tl.constexpr = GATED and INTERLEAVED
        APART: tl.constexpr = GATED and not INTERLEAVED
        ROWS: tl.constexpr = 2 * BLOCK_I if PAIRED else BLOCK_I
        m = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_M)
        in_tile = m < tl.load(end_ptr + tile)
        t = tl.load(order_ptr + m, mask=in_tile, other=0) // top_k
        x_row = hidden_ptr + t.to(tl.int64)[:, None] * stride_ht
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        n = column * ROWS + tl.arange(0, ROWS)
        in_rows = n < (2 * I if PAIRED else I)
        base = gate_up_ptr + slot * stride_gs + n.to(tl.int64)[None, :] * stride_gn
        up_base = gate_up_ptr + slot * stride_gs + (n + I).to(tl.int64)[None, :] * stride_gn
        gate = tl.zeros([BLOCK_M, ROWS], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            x_mask = in_tile[:, None] & (h < H)[None, :]
            x = tl.load(x_row + h[None, :], mask=x_mask, other=0.0)
            mask = (h < H)[:, None] & in_rows[None, :]
            w = tl.load(base + h[:, None] * stride_gh, mask=mask, other=0.0)
            gate = multiply(x, w, gate, UPCAST)
            if APART:
                w = tl.load(up_base + h[:, None] * stride_gh, mask=mask, other=0.0)
                up = multiply(x, w, up, UPCAST)
        if HAS_BIAS:
            bias = bias_ptr + slot * stride_bs + n
            gate += tl.load(bias, mask=in_rows, other=0.0).to(tl.float32)[None, :]
            if APART:
                up += tl.load(bias + I, mask=in_rows, other=0.0).to(tl.float32)[None, :]
        if PAIRED:
            gate, up = tl.split(tl.reshape(gate, [BLOCK_M, BLOCK_I, 2]))
        value = activate(gate, up, alpha, limit, ACTIVATION, GATED)
        pointer = act_ptr + m.to(tl.int64)[:, None] * I + i[None, :]
        mask = in_tile[:, None] & (i < I)[None, :]
        tl.store(pointer, value.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def down_grouped(
    act_ptr, down_ptr, bias_ptr, routes_ptr, order_ptr, slot_ptr, first_ptr, end_ptr,
    tiles, H, I, stride_ds, stride_dh, stride_di, stride_bs,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """routes[r(m), h] = (down[slot(m)] @ act[m])[h] for sorted rows m; r(m) is order[m].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | act | [R, I] | W | contiguous | from gate_up_grouped |
    | down | [S, H, I] | W | (stride_ds, stride_dh, stride_di) | |
    | bias | [S, H] | W/float32 | (stride_bs, 1) | read when HAS_BIAS |
    | routes | [R, H] | W | contiguous | rows in the order of the router |
    | order, slot, first, end | [R], 3 x [tiles] | int32 | contiguous | see Tiles |

    Grid (tiles * ceil(H / BLOCK_H),). Bytes: H * I * sizeof(W) per distinct slot at best, I and H
    per row; FLOPs: 2 * H * I per present route.

    The second product over the same tiles. Weights of the router are left to `combine`, which can
    then add a token's routes in their order even if they came from different waves.
    """
    tile, column = place(tiles, tl.cdiv(H, BLOCK_H), GROUP)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot >= 0:
        m = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_M)
        in_tile = m < tl.load(end_ptr + tile)
        r = tl.load(order_ptr + m, mask=in_tile, other=0)
        a_row = act_ptr + m.to(tl.int64)[:, None] * I
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        base = down_ptr + slot * stride_ds + h.to(tl.int64)[None, :] * stride_dh
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for i0 in range(0, I, BLOCK_I):
            i = i0 + tl.arange(0, BLOCK_I)
            a_mask = in_tile[:, None] & (i < I)[None, :]
            a = tl.load(a_row + i[None, :], mask=a_mask, other=0.0)
            mask = (i < I)[:, None] & (h < H)[None, :]
            w = tl.load(base + i[:, None] * stride_di, mask=mask, other=0.0)
            acc = multiply(a, w, acc, UPCAST)
        if HAS_BIAS:
            b = tl.load(bias_ptr + slot * stride_bs + h, mask=h < H, other=0.0)
            acc += b.to(tl.float32)[None, :]
        pointer = routes_ptr + r.to(tl.int64)[:, None] * H + h[None, :]
        mask = in_tile[:, None] & (h < H)[None, :]
        tl.store(pointer, acc.to(routes_ptr.dtype.element_ty), mask=mask)

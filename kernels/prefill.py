# mypy: ignore-errors
# ruff: noqa: E741 - I is the size of the index i, as in every table here.
"""Many tokens: one grouped matrix product over all experts, on the tensor cores.

The rows of a tile (see tiles.py) belong to one expert. `gate_up_grouped` gathers token rows as it
reads them and `down_grouped` scatters its rows back to their routes, so that `sum_routes` can add
them in the order of the router.
"""

import triton
import triton.language as tl

from .formats import add_product, multiplied
from .gates import apply_gate
from .palette import add_rare


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
    hidden_ptr, gate_ptr, up_ptr, gate_scales_ptr, up_scales_ptr, gate_zeros_ptr, up_zeros_ptr,
    gate_multiplier_ptr, up_multiplier_ptr, gate_bias_ptr, up_bias_ptr, act_ptr,
    order_ptr, slot_ptr, first_ptr, end_ptr,
    tiles, top_k, H, I, stride_ht, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_up_ws, stride_up_wn, stride_up_wk, stride_up_cs, stride_up_cn, stride_up_ck,
    stride_ms, stride_bs, stride_bn, alpha, limit,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    UP_FORMAT: tl.constexpr, UP_SCALE_TYPE: tl.constexpr, UP_SCALE_N: tl.constexpr,
    UP_SCALE_K: tl.constexpr,
    FOLD: tl.constexpr, FUNCTION: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    UP_FOLD: tl.constexpr, UP_UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act[m, i] = apply_gate(gate[slot(m)] @ hidden[t(m)], up[slot(m)] @ hidden[t(m)]), m sorted.

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | hidden | [T, H] | X | (stride_ht, 1) | tokens |
    | gate, up | [S, I, H] | by FORMAT | (stride_ws, stride_wn, stride_wk) | up may be None |
    | gate_scales, up_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | gate_zeros, up_zeros | | int8 | as the scales, see Matrix | or None |
    | UP_FORMAT, stride_up_... | | | | how up is stored; None: as gate |
    | gate_multiplier, up_multiplier | [S] | float32 | stride_ms | or None |
    | gate_bias, up_bias | [S, I] | X/float32 | (stride_bs, stride_bn) | or None |
    | act | [R, I] | X | contiguous | rows in sorted order |
    | order, slot, first, end | [R], 3 x [tiles] | int32 | contiguous | see Tiles |

    Grid (tiles * ceil(I / BLOCK_I),). Bytes: those of gate and up per distinct slot at best, H and
    I per row; FLOPs: 4 * I * H per present route.

    A program multiplies BLOCK_M gathered token rows with BLOCK_I rows of gate and of up and applies
    the activation before it writes. Programs that share weights run side by side.
    """
    tile, column = place(tiles, tl.cdiv(I, BLOCK_I), GROUP)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot >= 0:
        m = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_M)
        in_tile = m < tl.load(end_ptr + tile)
        t = tl.load(order_ptr + m, mask=in_tile, other=0) // top_k
        x_row = hidden_ptr + t.to(tl.int64)[:, None] * stride_ht
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < I
        gate = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            x_mask = in_tile[:, None] & (h < H)[None, :]
            x = tl.load(x_row + h[None, :], mask=x_mask, other=0.0)
            gate = add_product(
                gate, x, gate_ptr, gate_scales_ptr, gate_zeros_ptr, slot, i[None, :], in_i[None, :],
                h0, H,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_H, True,
            )  # fmt: skip
            if up_ptr is not None:
                if UP_FORMAT is None:
                    up = add_product(
                        up, x, up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[None, :], in_i[None, :],
                        h0, H,
                        stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                        FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_H, True,
                    )  # fmt: skip
                else:
                    up = add_product(
                        up, x, up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[None, :], in_i[None, :],
                        h0, H,
                        stride_up_ws, stride_up_wn, stride_up_wk,
                        stride_up_cs, stride_up_cn, stride_up_ck,
                        UP_FORMAT, UP_SCALE_TYPE, UP_SCALE_N, UP_SCALE_K, UP_FOLD, UP_UPCAST,
                        BLOCK_H, True,
                    )  # fmt: skip
        gate = add_rare(
            gate, x_row, in_tile[:, None], gate_ptr, slot, i[None, :], in_i[None, :], H,
            stride_ws, stride_wn, FORMAT, SCALE_TYPE,
        )  # fmt: skip
        gate = multiplied(gate, gate_multiplier_ptr, slot, True, stride_ms)
        if up_ptr is not None:
            if UP_FORMAT is None:
                up = add_rare(
                    up, x_row, in_tile[:, None], up_ptr, slot, i[None, :], in_i[None, :], H,
                    stride_ws, stride_wn, FORMAT, SCALE_TYPE,
                )  # fmt: skip
            else:
                up = add_rare(
                    up, x_row, in_tile[:, None], up_ptr, slot, i[None, :], in_i[None, :], H,
                    stride_up_ws, stride_up_wn, UP_FORMAT, UP_SCALE_TYPE,
                )  # fmt: skip
            up = multiplied(up, up_multiplier_ptr, slot, True, stride_ms)
        if gate_bias_ptr is not None:
            offset = slot * stride_bs + i * stride_bn
            gate += tl.load(gate_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)[None, :]
            if up_ptr is not None:
                up += tl.load(up_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)[None, :]
        value = apply_gate(gate, up, alpha, limit, FUNCTION, ACTIVATION)
        pointer = act_ptr + m.to(tl.int64)[:, None] * I + i[None, :]
        mask = in_tile[:, None] & in_i[None, :]
        tl.store(pointer, value.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def down_grouped(
    act_ptr, down_ptr, down_scales_ptr, down_zeros_ptr, down_multiplier_ptr,
    down_bias_ptr, routes_ptr,
    order_ptr, slot_ptr, first_ptr, end_ptr,
    tiles, H, I, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_ms, stride_bs, stride_bn,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    FOLD: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """routes[r(m), h] = (down[slot(m)] @ act[m])[h] for sorted rows m; r(m) is order[m].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | act | [R, I] | X | contiguous | from gate_up_grouped |
    | down | [S, H, I] | by FORMAT | (stride_ws, stride_wn, stride_wk) | |
    | down_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | down_zeros | | int8 | as the scales, see Matrix | or None |
    | down_multiplier | [S] | float32 | stride_ms | or None |
    | down_bias | [S, H] | X/float32 | (stride_bs, stride_bn) | or None |
    | routes | [R, H] | X | contiguous | rows in the order of the router |
    | order, slot, first, end | [R], 3 x [tiles] | int32 | contiguous | see Tiles |

    Grid (tiles * ceil(H / BLOCK_H),). Bytes: those of down per distinct slot at best, I and H per
    row; FLOPs: 2 * H * I per present route.

    The second product over the same tiles. Weights of the router are left to `sum_routes`, which
    can then add a token's routes in their order even if they came from different waves.
    """
    tile, column = place(tiles, tl.cdiv(H, BLOCK_H), GROUP)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot >= 0:
        m = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_M)
        in_tile = m < tl.load(end_ptr + tile)
        r = tl.load(order_ptr + m, mask=in_tile, other=0)
        a_row = act_ptr + m.to(tl.int64)[:, None] * I
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for i0 in range(0, I, BLOCK_I):
            i = i0 + tl.arange(0, BLOCK_I)
            a_mask = in_tile[:, None] & (i < I)[None, :]
            a = tl.load(a_row + i[None, :], mask=a_mask, other=0.0)
            acc = add_product(
                acc, a, down_ptr, down_scales_ptr, down_zeros_ptr, slot,
                h[None, :], (h < H)[None, :], i0, I,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_I, True,
            )  # fmt: skip
        acc = add_rare(
            acc, a_row, in_tile[:, None], down_ptr, slot, h[None, :], (h < H)[None, :], I,
            stride_ws, stride_wn, FORMAT, SCALE_TYPE,
        )  # fmt: skip
        acc = multiplied(acc, down_multiplier_ptr, slot, True, stride_ms)
        if down_bias_ptr is not None:
            bias = down_bias_ptr + slot * stride_bs + h * stride_bn
            acc += tl.load(bias, mask=h < H, other=0.0).to(tl.float32)[None, :]
        pointer = routes_ptr + r.to(tl.int64)[:, None] * H + h[None, :]
        mask = in_tile[:, None] & (h < H)[None, :]
        tl.store(pointer, acc.to(routes_ptr.dtype.element_ty), mask=mask)

# mypy: ignore-errors
# ruff: noqa: E741 - I is the size of the index i, as in every table here.
"""2 to 16 tokens: tokens that share an expert read it together, through the tensor cores.

Two kernels, `gate_up_shared` then `down_shared`. Weights stand in the rows of the product and up to
16 tokens in its columns, so nothing is sorted and no row of weights is padded. The routes that read
one slot are a group; the first of them, in the order of routes, leads it. Never uses atomics.
"""

import triton
import triton.language as tl

from .formats import add_product, multiplied
from .gates import apply_gate
from .lookup import slot_of
from .palette import add_rare


@triton.jit
def write_groups(groups_ptr, ids_ptr, map_ptr, R, top_k, R_PAD: tl.constexpr):
    """Writes what down_shared walks: how many groups, their leaders, a row per route.

    groups[0] is the number of groups; groups[1 + g] the leader of group g, by first appearance;
    groups[1 + R + r] the first route of r's own token that reads r's slot (r itself unless a token
    names an expert twice), -1 where r is absent. R_PAD is a power of two >= R.
    """
    r = tl.arange(0, R_PAD)
    slot = slot_of(ids_ptr, map_ptr, r, r < R)
    leads = slot >= 0
    row = r
    for q in range(0, R):
        same = (slot == slot_of(ids_ptr, map_ptr, q, q >= 0)) & (q < r)
        leads = leads & (same == 0)
        row = tl.where(same & (r // top_k == q // top_k), tl.minimum(row, q), row)
    place = tl.cumsum(leads.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr, tl.sum(leads.to(tl.int32), axis=0))
    tl.store(groups_ptr + 1 + place, r, mask=leads)
    tl.store(groups_ptr + 1 + R + r, tl.where(slot >= 0, row, -1), mask=r < R)


@triton.jit(do_not_specialize=["T"])
def gate_up_shared(
    hidden_ptr, ids_ptr, map_ptr, gate_ptr, up_ptr, gate_scales_ptr, up_scales_ptr,
    gate_zeros_ptr, up_zeros_ptr,
    gate_multiplier_ptr, up_multiplier_ptr, gate_bias_ptr, up_bias_ptr, act_ptr, groups_ptr,
    rows_ptr,
    T, top_k, H, I, stride_ht, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_up_ws, stride_up_wn, stride_up_wk, stride_up_cs, stride_up_cn, stride_up_ck,
    stride_ms, stride_bs, stride_bn, alpha, limit,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    UP_FORMAT: tl.constexpr, UP_SCALE_TYPE: tl.constexpr, UP_SCALE_N: tl.constexpr,
    UP_SCALE_K: tl.constexpr,
    FOLD: tl.constexpr, FUNCTION: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    UP_FOLD: tl.constexpr, UP_UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, K_PAD: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """act[r, i] = apply_gate(gate[slot] @ hidden[t], up[slot] @ hidden[t]) for each group's tokens.

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | hidden | [T, H] | X | (stride_ht, 1) | tokens, T <= TOKENS |
    | ids, map | [T*k], [E] | int32/64 | contiguous | slot ids, or expert ids and their slots |
    | gate, up | [S, I, H] | by FORMAT | (stride_ws, stride_wn, stride_wk) | up may be None |
    | gate_scales, up_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | gate_zeros, up_zeros | | int8 | as the scales, see Matrix | or None |
    | UP_FORMAT, stride_up_... | | | | how up is stored; None: as gate |
    | gate_multiplier, up_multiplier | [S] | float32 | stride_ms | or None |
    | gate_bias, up_bias | [S, I] | X/float32 | (stride_bs, stride_bn) | or None |
    | act | [T*k, I] | X | contiguous | written at the first route of each token of a group |
    | groups | [1 + 2*T*k] | int32 | contiguous | written: see write_groups |
    | rows | [T*k, TOKENS] | int32 | contiguous | written for leaders: the route by which token t
      reads the slot, or T*k if it does not |

    Grid (T*k, ceil(I / BLOCK_I)). Bytes: those of gate and up per distinct slot; FLOPs that count:
    4 * I * H per present route (the tensor cores do TOKENS / tokens of the group times as many).

    Only a group's leader works: BLOCK_I rows of gate and of up, times the hidden rows of the
    group's tokens. The first program also writes the groups, hidden behind all others.
    """
    r = tl.program_id(0)
    R = T * top_k
    if (r == 0) & (tl.program_id(1) == 0):
        write_groups(groups_ptr, ids_ptr, map_ptr, R, top_k, R_PAD)
    slot = slot_of(ids_ptr, map_ptr, r, r >= 0)
    t = tl.arange(0, TOKENS)
    j = tl.arange(0, K_PAD)
    flat = t[:, None] * top_k + j[None, :]
    valid = (t < T)[:, None] & (j < top_k)[None, :]
    slots = slot_of(ids_ptr, map_ptr, flat, valid)
    row = tl.min(tl.where(slots == slot, flat, R), axis=1)
    if (slot >= 0) & (tl.min(row, axis=0) == r):
        if tl.program_id(1) == 0:
            tl.store(rows_ptr + r * TOKENS + t, row)
        i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < I
        here = row < R
        gate = tl.zeros([BLOCK_I, TOKENS], tl.float32)
        up = tl.zeros([BLOCK_I, TOKENS], tl.float32)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            x_mask = (h < H)[:, None] & here[None, :]
            x = tl.load(hidden_ptr + t[None, :] * stride_ht + h[:, None], mask=x_mask, other=0.0)
            gate = add_product(
                gate, x, gate_ptr, gate_scales_ptr, gate_zeros_ptr, slot, i[:, None], in_i[:, None],
                h0, H,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_H, False,
            )  # fmt: skip
            if up_ptr is not None:
                if UP_FORMAT is None:
                    up = add_product(
                        up, x, up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[:, None], in_i[:, None],
                        h0, H,
                        stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                        FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_H, False,
                    )  # fmt: skip
                else:
                    up = add_product(
                        up, x, up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[:, None], in_i[:, None],
                        h0, H,
                        stride_up_ws, stride_up_wn, stride_up_wk,
                        stride_up_cs, stride_up_cn, stride_up_ck,
                        UP_FORMAT, UP_SCALE_TYPE, UP_SCALE_N, UP_SCALE_K, UP_FOLD, UP_UPCAST,
                        BLOCK_H, False,
                    )  # fmt: skip
        token = hidden_ptr + t[None, :] * stride_ht
        gate = add_rare(
            gate, token, here[None, :], gate_ptr, slot, i[:, None], in_i[:, None], H,
            stride_ws, stride_wn, FORMAT, SCALE_TYPE,
        )  # fmt: skip
        gate = multiplied(gate, gate_multiplier_ptr, slot, True, stride_ms)
        if up_ptr is not None:
            if UP_FORMAT is None:
                up = add_rare(
                    up, token, here[None, :], up_ptr, slot, i[:, None], in_i[:, None], H,
                    stride_ws, stride_wn, FORMAT, SCALE_TYPE,
                )  # fmt: skip
            else:
                up = add_rare(
                    up, token, here[None, :], up_ptr, slot, i[:, None], in_i[:, None], H,
                    stride_up_ws, stride_up_wn, UP_FORMAT, UP_SCALE_TYPE,
                )  # fmt: skip
            up = multiplied(up, up_multiplier_ptr, slot, True, stride_ms)
        if gate_bias_ptr is not None:
            offset = slot * stride_bs + i * stride_bn
            gate += tl.load(gate_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)[:, None]
            if up_ptr is not None:
                up += tl.load(up_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)[:, None]
        value = apply_gate(gate, up, alpha, limit, FUNCTION, ACTIVATION)
        pointer = act_ptr + row.to(tl.int64)[None, :] * I + i[:, None]
        tl.store(pointer, value.to(act_ptr.dtype.element_ty), mask=in_i[:, None] & here[None, :])


@triton.jit(do_not_specialize=["T", "per_route"])
def down_shared(
    act_ptr, ids_ptr, map_ptr, weights_ptr, down_ptr, down_scales_ptr, down_zeros_ptr,
    down_multiplier_ptr,
    down_bias_ptr, groups_ptr, rows_ptr, routes_ptr, out_ptr,
    T, top_k, H, I, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_ms, stride_bs, stride_bn, stride_ot, per_route,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    FOLD: tl.constexpr, UPCAST: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over j, in order, of weight[t, j] * (down[slot(t, j)] @ act[t, j])[h].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | act, groups, rows | | | | from gate_up_shared |
    | ids, map | [T*k], [E] | int32/64 | contiguous | as in gate_up_shared |
    | weights | [T*k] | any float | contiguous | routing weights |
    | down | [S, H, I] | by FORMAT | (stride_ws, stride_wn, stride_wk) | |
    | down_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | down_zeros | | int8 | as the scales, see Matrix | or None |
    | down_multiplier | [S] | float32 | stride_ms | or None |
    | down_bias | [S, H] | X/float32 | (stride_bs, stride_bn) | or None |
    | routes | [T*k, H] | float32 | contiguous | one expert's output for one token; the whole
      result when per_route, room to work in otherwise |
    | out | [T, H] | X | (stride_ot, 1) | written when not per_route |

    Grid (ceil(H / BLOCK_H),). Bytes: those of down per distinct slot, and 8 per route and column
    of H for `routes`; FLOPs that count: 2 * H * I per present route.

    A program owns BLOCK_H columns of the output for all tokens, so its loop runs over every group
    without a break and each weight is read once. What it wrote to `routes` it reads back after a
    barrier and adds in the order of j: no other program is waited for.
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, TOKENS)
    R = T * top_k
    blocks = tl.cdiv(I, BLOCK_I)
    groups = tl.load(groups_ptr)
    acc = tl.zeros([BLOCK_H, TOKENS], tl.float32)
    # The ids of a step are loaded in the step before, so that the loads of weights, which depend on
    # nothing else, can run several steps ahead.
    r = tl.load(groups_ptr + 1, mask=groups > 0, other=0)
    slot = slot_of(ids_ptr, map_ptr, r, groups > 0)
    row = tl.load(rows_ptr + r * TOKENS + t)
    for step in range(0, groups * blocks):
        block = step % blocks
        here = row < R
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        a_mask = (i < I)[:, None] & here[None, :]
        a = tl.load(act_ptr + row.to(tl.int64)[None, :] * I + i[:, None], mask=a_mask, other=0.0)
        acc = add_product(
            acc, a, down_ptr, down_scales_ptr, down_zeros_ptr, slot, h[:, None], (h < H)[:, None],
            block * BLOCK_I, I,
            stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
            FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, FOLD, UPCAST, BLOCK_I, False,
        )  # fmt: skip
        # Until a group's last block nothing is written; after it the sum starts anew.
        last = block == blocks - 1
        written = h < tl.where(last, H, 0)
        if SCALE_TYPE == "palette":  # noqa: SIM102 - a constant, and a number of the GPU
            if last:
                acc = add_rare(
                    acc, act_ptr + row.to(tl.int64)[None, :] * I, here[None, :], down_ptr, slot,
                    h[:, None], (h < H)[:, None], I, stride_ws, stride_wn, FORMAT, SCALE_TYPE,
                )  # fmt: skip
        y = multiplied(acc, down_multiplier_ptr, slot, last, stride_ms)
        if down_bias_ptr is not None:
            bias = down_bias_ptr + slot * stride_bs + h * stride_bn
            y += tl.load(bias, mask=written, other=0.0).to(tl.float32)[:, None]
        pointer = routes_ptr + row.to(tl.int64)[None, :] * H + h[:, None]
        tl.store(pointer, y, mask=written[:, None] & here[None, :])
        acc = tl.where(last, 0.0, acc)
        r = tl.load(groups_ptr + 1 + tl.minimum((step + 1) // blocks, groups - 1))
        slot = slot_of(ids_ptr, map_ptr, r, r >= 0)
        row = tl.load(rows_ptr + r * TOKENS + t)
    tl.debug_barrier()
    out = tl.zeros([TOKENS, BLOCK_H], tl.float32)
    for j in range(0, top_k):
        own = t * top_k + j
        first = tl.load(groups_ptr + 1 + R + own, mask=t < T, other=-1)
        mask = (first >= 0)[:, None] & (h < H)[None, :]
        pointer = routes_ptr + first.to(tl.int64)[:, None] * H + h[None, :]
        y = tl.load(pointer, mask=mask, other=0.0)
        if per_route != 0:
            # An expert named twice by one token was computed once: give the second its copy.
            pointer = routes_ptr + own.to(tl.int64)[:, None] * H + h[None, :]
            tl.store(pointer, y, mask=mask & (first != own)[:, None])
        else:
            weight = tl.load(weights_ptr + own, mask=t < T, other=0.0).to(tl.float32)
            out = tl.where(mask, tl.fma(y, weight[:, None], out), out)
    if per_route == 0:
        pointer = out_ptr + t.to(tl.int64)[:, None] * stride_ot + h[None, :]
        mask = (t < T)[:, None] & (h < H)[None, :]
        tl.store(pointer, out.to(out_ptr.dtype.element_ty), mask=mask)

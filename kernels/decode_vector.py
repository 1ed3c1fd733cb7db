# mypy: ignore-errors
# ruff: noqa: E741 - I is the size of the index i, as in every table here.
"""One token: each weight is read once and multiplied by a vector, with no tensor core in the way.

Two kernels, `gate_up_vector` then `down_vector`. `paths.py` launches them, also for up to 16
tokens of dtypes that a GPU's tensor cores lack. Never sorts, never pads rows, never uses atomics.
"""

import triton
import triton.language as tl

from .formats import load_tile, multiplied
from .gates import apply_gate
from .lookup import slot_of
from .palette import add_rare


@triton.jit
def gate_up_vector(
    hidden_ptr, ids_ptr, map_ptr, gate_ptr, up_ptr, gate_scales_ptr, up_scales_ptr,
    gate_zeros_ptr, up_zeros_ptr,
    gate_multiplier_ptr, up_multiplier_ptr, gate_bias_ptr, up_bias_ptr, act_ptr,
    top_k, H, I, stride_ht, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_up_ws, stride_up_wn, stride_up_wk, stride_up_cs, stride_up_cn, stride_up_ck,
    stride_ms, stride_bs, stride_bn, alpha, limit,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    UP_FORMAT: tl.constexpr, UP_SCALE_TYPE: tl.constexpr, UP_SCALE_N: tl.constexpr,
    UP_SCALE_K: tl.constexpr,
    FUNCTION: tl.constexpr, ACTIVATION: tl.constexpr, ROWWISE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act[r, i] = apply_gate(gate[slot(r)] @ hidden[t], up[slot(r)] @ hidden[t]), r = t * k + j.

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | hidden | [T, H] | X | (stride_ht, 1) | tokens |
    | ids, map | [T*k], [E] | int32/64 | contiguous | slot ids, or expert ids and their slots |
    | gate, up | [S, I, H] | by FORMAT | (stride_ws, stride_wn, stride_wk) | up may be None |
    | gate_scales, up_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | gate_zeros, up_zeros | | int8 | as the scales, see Matrix | or None |
    | UP_FORMAT, stride_up_... | | | | how up is stored; None: as gate |
    | gate_multiplier, up_multiplier | [S] | float32 | stride_ms | or None |
    | gate_bias, up_bias | [S, I] | X/float32 | (stride_bs, stride_bn) | or None |
    | act | [T*k, I] | X | contiguous | written for present routes only |

    Grid (T*k, ceil(I / BLOCK_I)). Bytes: those of gate and up per present route; FLOPs: 4 * I * H
    per present route.

    A program owns BLOCK_I rows of gate and of up and walks along H with partial sums per lane, so
    that lanes are added up once, at the end (ROWWISE: weights are contiguous along H). Routes are
    the fastest axis: tokens that share an expert read its rows at the same time, and all but the
    first find them in L2.
    """
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    slot = slot_of(ids_ptr, map_ptr, r, r >= 0)
    if slot >= 0:
        in_i = i < I
        token = hidden_ptr + (r // top_k).to(tl.int64) * stride_ht
        gate = tl.zeros([BLOCK_I, BLOCK_H], tl.float32)
        up = tl.zeros([BLOCK_I, BLOCK_H], tl.float32)
        for h0 in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            h = h0 + tl.arange(0, BLOCK_H)
            if ROWWISE:
                # Spread over the rows as the weights are: the copies come from L1, and no barrier
                # is needed to hand values from thread to thread.
                spread = tl.broadcast_to(h[None, :], [BLOCK_I, BLOCK_H])
                x = tl.load(token + spread, mask=spread < H, other=0.0).to(tl.float32)
            else:
                x = tl.load(token + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
            w = load_tile(
                gate_ptr, gate_scales_ptr, gate_zeros_ptr, slot, i[:, None], in_i[:, None], h0, H,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                tl.float32, FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, BLOCK_H,
            )  # fmt: skip
            gate = tl.fma(w, x, gate)
            if up_ptr is not None:
                if UP_FORMAT is None:
                    w = load_tile(
                        up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[:, None], in_i[:, None], h0, H,
                        stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                        tl.float32, FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, BLOCK_H,
                    )  # fmt: skip
                else:
                    w = load_tile(
                        up_ptr, up_scales_ptr, up_zeros_ptr, slot, i[:, None], in_i[:, None], h0, H,
                        stride_up_ws, stride_up_wn, stride_up_wk,
                        stride_up_cs, stride_up_cn, stride_up_ck,
                        tl.float32, UP_FORMAT, UP_SCALE_TYPE, UP_SCALE_N, UP_SCALE_K, BLOCK_H,
                    )  # fmt: skip
                up = tl.fma(w, x, up)
        gate_sum = add_rare(
            tl.sum(gate, axis=1), token, in_i, gate_ptr, slot, i, in_i, H,
            stride_ws, stride_wn, FORMAT, SCALE_TYPE,
        )  # fmt: skip
        gate_sum = multiplied(gate_sum, gate_multiplier_ptr, slot, True, stride_ms)
        up_sum = tl.sum(up, axis=1)
        if up_ptr is not None:
            if UP_FORMAT is None:
                up_sum = add_rare(
                    up_sum, token, in_i, up_ptr, slot, i, in_i, H,
                    stride_ws, stride_wn, FORMAT, SCALE_TYPE,
                )  # fmt: skip
            else:
                up_sum = add_rare(
                    up_sum, token, in_i, up_ptr, slot, i, in_i, H,
                    stride_up_ws, stride_up_wn, UP_FORMAT, UP_SCALE_TYPE,
                )  # fmt: skip
            up_sum = multiplied(up_sum, up_multiplier_ptr, slot, True, stride_ms)
        if gate_bias_ptr is not None:
            offset = slot * stride_bs + i * stride_bn
            gate_sum += tl.load(gate_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)
            if up_ptr is not None:
                up_sum += tl.load(up_bias_ptr + offset, mask=in_i, other=0.0).to(tl.float32)
        value = apply_gate(gate_sum, up_sum, alpha, limit, FUNCTION, ACTIVATION)
        pointer = act_ptr + r.to(tl.int64) * I + i
        tl.store(pointer, value.to(act_ptr.dtype.element_ty), mask=in_i)


@triton.jit
def add_route(out, y, ids_ptr, map_ptr, weights_ptr, r, valid):
    """out + weight[r] * y, rounded once; `out` itself where route r is absent."""
    present = slot_of(ids_ptr, map_ptr, r, valid) >= 0
    weight = tl.load(weights_ptr + r, mask=valid, other=0.0).to(tl.float32)
    return tl.where(present, tl.fma(y, weight, out), out)


@triton.jit(do_not_specialize=["per_route"])
def down_vector(
    act_ptr, ids_ptr, map_ptr, weights_ptr, down_ptr, down_scales_ptr, down_zeros_ptr,
    down_multiplier_ptr,
    down_bias_ptr, routes_ptr, out_ptr,
    top_k, H, I, stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    stride_ms, stride_bs, stride_bn, stride_ot, per_route,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    ROUTES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over j, in order, of weight[t, j] * (down[slot(t, j)] @ act[t, j])[h].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | act | [T*k, I] | X | contiguous | from gate_up_vector |
    | ids, map | [T*k], [E] | int32/64 | contiguous | as in gate_up_vector |
    | weights | [T*k] | any float | contiguous | routing weights |
    | down | [S, H, I] | by FORMAT | (stride_ws, stride_wn, stride_wk) | |
    | down_scales | | by FORMAT | (stride_cs, stride_cn, stride_ck) | or None |
    | down_zeros | | int8 | as the scales, see Matrix | or None |
    | down_multiplier | [S] | float32 | stride_ms | or None |
    | down_bias | [S, H] | X/float32 | (stride_bs, stride_bn) | or None |
    | routes | [T*k, H] | float32 | contiguous | written instead of out when per_route |
    | out | [T, H] | X | (stride_ot, 1) | written when not per_route |

    Grid (T, ceil(H / BLOCK_H)). Bytes: those of down per present route; FLOPs: 2 * H * I per
    present route.

    A program splits the sum over (j, i) for its BLOCK_H rows: ROUTES routes side by side, a warp
    or more for each, lanes along I; then it adds the finished routes one after the other in the
    order of j. `per_route` is a run-time flag so that with float32 weights the same machine code
    makes every y, whether it is summed here or by `sum_routes` after the last wave.
    """
    t = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    out = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, top_k, ROUTES):
        j = first + tl.arange(0, ROUTES)
        r = t * top_k + j
        slot = slot_of(ids_ptr, map_ptr, r, j < top_k)
        present = slot >= 0
        acc = tl.zeros([BLOCK_H, ROUTES, BLOCK_I], tl.float32)
        for i0 in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            i = i0 + tl.arange(0, BLOCK_I)
            # In the shape and dtype of the weights, so that lanes find their values in place.
            in_act = present[None, :, None] & (i < I)[None, None, :]
            a_row = act_ptr + r.to(tl.int64)[None, :, None] * I
            a = tl.load(a_row + i[None, None, :], mask=in_act, other=0.0).to(tl.float32)
            w = load_tile(
                down_ptr, down_scales_ptr, down_zeros_ptr, slot[None, :, None], h[:, None, None],
                (h < H)[:, None, None] & present[None, :, None], i0, I,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                tl.float32, FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, BLOCK_I,
            )  # fmt: skip
            acc = tl.fma(w, a, acc)
        in_y = (h < H)[:, None] & present[None, :]
        y = add_rare(
            tl.sum(acc, axis=2), act_ptr + r.to(tl.int64)[None, :] * I, present[None, :],
            down_ptr, slot[None, :], h[:, None], in_y, I, stride_ws, stride_wn, FORMAT, SCALE_TYPE,
        )  # fmt: skip
        y = multiplied(y, down_multiplier_ptr, slot[None, :], present[None, :], stride_ms)
        if down_bias_ptr is not None:
            bias = down_bias_ptr + slot[None, :] * stride_bs + h[:, None] * stride_bn
            y += tl.load(bias, mask=in_y, other=0.0).to(tl.float32)
        if per_route != 0:
            tl.store(routes_ptr + r[None, :].to(tl.int64) * H + h[:, None], y, mask=in_y)
        else:
            q = t * top_k + first
            if ROUTES == 1:
                y0 = tl.reshape(y, [BLOCK_H])
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q >= 0)
            elif ROUTES == 2:
                y0, y1 = tl.split(y)
                end = t * top_k + top_k
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q < end)
                out = add_route(out, y1, ids_ptr, map_ptr, weights_ptr, q + 1, q + 1 < end)
            else:
                even, odd = tl.split(tl.reshape(y, [BLOCK_H, 2, 2]))
                y0, y2 = tl.split(even)
                y1, y3 = tl.split(odd)
                end = t * top_k + top_k
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q < end)
                out = add_route(out, y1, ids_ptr, map_ptr, weights_ptr, q + 1, q + 1 < end)
                out = add_route(out, y2, ids_ptr, map_ptr, weights_ptr, q + 2, q + 2 < end)
                out = add_route(out, y3, ids_ptr, map_ptr, weights_ptr, q + 3, q + 3 < end)
    if per_route == 0:
        row = out_ptr + t.to(tl.int64) * stride_ot
        tl.store(row + h, out.to(out_ptr.dtype.element_ty), mask=h < H)

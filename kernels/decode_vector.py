# mypy: ignore-errors
# ruff: noqa: E741 - I is the size of the index i, as in every table here.
"""One token: each weight is read once and multiplied by a vector, with no tensor core in the way.

Two kernels, `gate_up_vector` then `down_vector`. Launched by `launch.py`; they also serve up to 16
tokens for dtypes that a GPU's tensor cores lack. Never sorts, never pads rows, never uses atomics.
"""

import triton
import triton.language as tl

from .activations import activate
from .lookup import segment_base, slot_of


@triton.jit
def gate_up_vector(
    hidden_ptr, ids_ptr, map_ptr, gate_up_ptr, bias_ptr, source_ptr, bias_source_ptr, act_ptr,
    top_k, H, I, stride_ht, stride_gs, stride_gn, stride_gh, stride_bs, alpha, limit,
    HAS_MAP: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, READ_THROUGH: tl.constexpr, ROWWISE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act[r, i] = activation(gate_up[slot(r), :, :] @ hidden[t]) for every route r = t * k + j.

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | hidden | [T, H] | W | (stride_ht, 1) | tokens |
    | ids, map | [T*k], [E] | int32/64 | contiguous | slot ids, or expert ids and their slots |
    | gate_up | [S, N, H] | W | (stride_gs, stride_gn, stride_gh) | N is 2I, or I when not GATED |
    | bias | [S, N] | W/float32 | (stride_bs, 1) | read when HAS_BIAS |
    | source, bias_source | [T*k] | int64 | contiguous | READ_THROUGH: address of a missed
      expert's segment, 0 for a resident one |
    | act | [T*k, I] | W | contiguous | written for present routes only |

    Grid (T*k, ceil(I / BLOCK_I)). Bytes: N * H * sizeof(W) per present route, plus as many written
    for a missed one; FLOPs: 2 * N * H per present route.

    A program owns BLOCK_I rows of gate and of up and walks along H with partial sums per lane, so
    that lanes are added up once, at the end (ROWWISE: weights are contiguous along H). Routes are
    the fastest axis: tokens that share an expert read its rows at the same time, and all but the
    first find them in L2.
    """
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    slot = slot_of(ids_ptr, map_ptr, r, r >= 0, HAS_MAP)
    if slot >= 0:
        # Interleaved rows 2i and 2i + 1 form one tile; otherwise gate and up are two.
        PAIRED: tl.constexpr = GATED and INTERLEAVED
        APART: tl.constexpr = GATED and not INTERLEAVED
        ROWS: tl.constexpr = 2 * BLOCK_I if PAIRED else BLOCK_I
        n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        end = 2 * I if PAIRED else I
        in_rows = n < end
        source = tl.load(source_ptr + r) if READ_THROUGH else 0
        copied = n < tl.where(source != 0, end, 0)
        base = segment_base(gate_up_ptr, slot, stride_gs, source, READ_THROUGH)
        target = gate_up_ptr + slot * stride_gs
        token = hidden_ptr + (r // top_k).to(tl.int64) * stride_ht
        gate = tl.zeros([ROWS, BLOCK_H], tl.float32)
        up = tl.zeros([BLOCK_I, BLOCK_H], tl.float32)
        for h0 in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            h = h0 + tl.arange(0, BLOCK_H)
            if ROWWISE:
                # Spread over the rows as the weights are: the copies come from L1, and no barrier
                # is needed to hand values from thread to thread.
                spread = tl.broadcast_to(h[None, :], [ROWS, BLOCK_H])
                x = tl.load(token + spread, mask=spread < H, other=0.0).to(tl.float32)
            else:
                x = tl.load(token + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
            offset = n.to(tl.int64)[:, None] * stride_gn + h[None, :] * stride_gh
            mask = in_rows[:, None] & (h < H)[None, :]
            w = tl.load(base + offset, mask=mask, other=0.0)
            gate = tl.fma(w.to(tl.float32), x, gate)
            if READ_THROUGH:
                tl.store(target + offset, w, mask=copied[:, None] & (h < H)[None, :])
            if APART:
                offset = (n + I).to(tl.int64)[:, None] * stride_gn + h[None, :] * stride_gh
                w = tl.load(base + offset, mask=mask, other=0.0)
                up = tl.fma(w.to(tl.float32), x, up)
                if READ_THROUGH:
                    tl.store(target + offset, w, mask=copied[:, None] & (h < H)[None, :])
        gate_sum = tl.sum(gate, axis=1)
        up_sum = tl.sum(up, axis=1)
        if HAS_BIAS:
            bias_source = tl.load(bias_source_ptr + r) if READ_THROUGH else 0
            bias = segment_base(bias_ptr, slot, stride_bs, bias_source, READ_THROUGH)
            kept = bias_ptr + slot * stride_bs
            b = tl.load(bias + n, mask=in_rows, other=0.0)
            gate_sum += b.to(tl.float32)
            if READ_THROUGH:
                tl.store(kept + n, b, mask=copied)
            if APART:
                b = tl.load(bias + I + n, mask=in_rows, other=0.0)
                up_sum += b.to(tl.float32)
                if READ_THROUGH:
                    tl.store(kept + I + n, b, mask=copied)
        if PAIRED:
            gate_sum, up_sum = tl.split(tl.reshape(gate_sum, [BLOCK_I, 2]))
        value = activate(gate_sum, up_sum, alpha, limit, ACTIVATION, GATED)
        pointer = act_ptr + r.to(tl.int64) * I + i
        tl.store(pointer, value.to(act_ptr.dtype.element_ty), mask=i < I)


@triton.jit
def add_route(out, y, ids_ptr, map_ptr, weights_ptr, r, valid, HAS_MAP: tl.constexpr):
    """out + weight[r] * y, rounded once; `out` itself where route r is absent."""
    present = slot_of(ids_ptr, map_ptr, r, valid, HAS_MAP) >= 0
    weight = tl.load(weights_ptr + r, mask=valid, other=0.0).to(tl.float32)
    return tl.where(present, tl.fma(y, weight, out), out)


@triton.jit(do_not_specialize=["per_route"])
def down_vector(
    act_ptr, ids_ptr, map_ptr, weights_ptr, down_ptr, bias_ptr, source_ptr, bias_source_ptr,
    routes_ptr, out_ptr,
    top_k, H, I, stride_ds, stride_dh, stride_di, stride_bs, stride_ot, per_route,
    HAS_MAP: tl.constexpr, HAS_BIAS: tl.constexpr, READ_THROUGH: tl.constexpr,
    ROUTES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over j, in order, of weight[t, j] * (down[slot(t, j)] @ act[t, j])[h].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | act | [T*k, I] | W | contiguous | from gate_up_vector |
    | ids, map | [T*k], [E] | int32/64 | contiguous | as in gate_up_vector |
    | weights | [T*k] | any float | contiguous | routing weights |
    | down | [S, H, I] | W | (stride_ds, stride_dh, stride_di) | |
    | bias | [S, H] | W/float32 | (stride_bs, 1) | read when HAS_BIAS |
    | source, bias_source | [T*k] | int64 | contiguous | as in gate_up_vector |
    | routes | [T*k, H] | float32 | contiguous | written instead of out when per_route |
    | out | [T, H] | W | (stride_ot, 1) | written when not per_route |

    Grid (T, ceil(H / BLOCK_H)). Bytes: H * I * sizeof(W) per present route, plus as many written
    for a missed one; FLOPs: 2 * H * I per present route.

    A program splits the sum over (j, i) for its BLOCK_H rows: ROUTES routes side by side, a warp
    or more for each, lanes along I; then it adds the finished routes one after the other in the
    order of j. `per_route` is a run-time flag so that with float32 weights the same machine code
    makes every y, whether it is summed here or by `combine` after the last wave.
    """
    t = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    out = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, top_k, ROUTES):
        j = first + tl.arange(0, ROUTES)
        r = t * top_k + j
        slot = slot_of(ids_ptr, map_ptr, r, j < top_k, HAS_MAP)
        present = slot >= 0
        source = tl.load(source_ptr + r, mask=present, other=0) if READ_THROUGH else 0
        base = segment_base(down_ptr, slot, stride_ds, source, READ_THROUGH)
        acc = tl.zeros([BLOCK_H, ROUTES, BLOCK_I], tl.float32)
        for i0 in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            i = i0 + tl.arange(0, BLOCK_I)
            # In the shape and dtype of the weights, so that lanes find their values in place.
            in_act = present[None, :, None] & (i < I)[None, None, :]
            a_row = act_ptr + r.to(tl.int64)[None, :, None] * I
            a = tl.load(a_row + i[None, None, :], mask=in_act, other=0.0).to(tl.float32)
            offset = h.to(tl.int64)[:, None, None] * stride_dh + i[None, None, :] * stride_di
            mask = (h < H)[:, None, None] & in_act
            w = tl.load(base[None, :, None] + offset, mask=mask, other=0.0)
            acc = tl.fma(w.to(tl.float32), a, acc)
            if READ_THROUGH:
                target = down_ptr + slot[None, :, None] * stride_ds + offset
                tl.store(target, w, mask=mask & (source != 0)[None, :, None])
        y = tl.sum(acc, axis=2)
        in_y = (h < H)[:, None] & present[None, :]
        if HAS_BIAS:
            bias_source = tl.load(bias_source_ptr + r, mask=present, other=0) if READ_THROUGH else 0
            bias = segment_base(bias_ptr, slot, stride_bs, bias_source, READ_THROUGH)
            b = tl.load(bias[None, :] + h[:, None], mask=in_y, other=0.0)
            y += b.to(tl.float32)
            if READ_THROUGH:
                kept = bias_ptr + slot[None, :] * stride_bs + h[:, None]
                tl.store(kept, b, mask=in_y & (bias_source != 0)[None, :])
        if per_route != 0:
            tl.store(routes_ptr + r[None, :].to(tl.int64) * H + h[:, None], y, mask=in_y)
        else:
            q = t * top_k + first
            if ROUTES == 1:
                y0 = tl.reshape(y, [BLOCK_H])
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q >= 0, HAS_MAP)
            elif ROUTES == 2:
                y0, y1 = tl.split(y)
                end = t * top_k + top_k
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q < end, HAS_MAP)
                out = add_route(out, y1, ids_ptr, map_ptr, weights_ptr, q + 1, q + 1 < end, HAS_MAP)
            else:
                even, odd = tl.split(tl.reshape(y, [BLOCK_H, 2, 2]))
                y0, y2 = tl.split(even)
                y1, y3 = tl.split(odd)
                end = t * top_k + top_k
                out = add_route(out, y0, ids_ptr, map_ptr, weights_ptr, q, q < end, HAS_MAP)
                out = add_route(out, y1, ids_ptr, map_ptr, weights_ptr, q + 1, q + 1 < end, HAS_MAP)
                out = add_route(out, y2, ids_ptr, map_ptr, weights_ptr, q + 2, q + 2 < end, HAS_MAP)
                out = add_route(out, y3, ids_ptr, map_ptr, weights_ptr, q + 3, q + 3 < end, HAS_MAP)
    if per_route == 0:
        row = out_ptr + t.to(tl.int64) * stride_ot
        tl.store(row + h, out.to(out_ptr.dtype.element_ty), mask=h < H)

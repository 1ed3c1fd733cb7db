# mypy: ignore-errors
"""The weighted sum over a token's routes, in order: the last step of prefill, and of waves.

Reads no weights of experts and knows no slots.
"""

import triton
import triton.language as tl


@triton.jit
def sum_routes(
    routes_ptr, ids_ptr, weights_ptr, out_ptr,
    top_k, H, stride_ot,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over j, in order, of weight[t, j] * routes[t, j, h].

    | argument | shape | dtype | strides | meaning |
    |---|---|---|---|---|
    | routes | [T, k, H] | float32 or X | contiguous | one expert's output for one token |
    | ids | [T, k] | int32/64 | contiguous | any ids; routes with a negative one are not read |
    | weights | [T, k] | any float | contiguous | routing weights |
    | out | [T, H] | X | (stride_ot, 1) | |

    Grid (T, ceil(H / BLOCK_H)). Bytes: k * H * sizeof(routes) read and H * sizeof(X) written per
    token; FLOPs: 2 * k * H per token. Each addition is one fused multiply-add, as in the decode
    kernels, so that a layer gives the same bits in one wave and in many.
    """
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    out = tl.zeros([BLOCK_H], tl.float32)
    for j in range(0, top_k):
        r = t * top_k + j
        present = tl.load(ids_ptr + r) >= 0
        mask = h < tl.where(present, H, 0)
        y = tl.load(routes_ptr + r * H + h, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + r).to(tl.float32)
        out = tl.where(mask, tl.fma(y, weight, out), out)
    tl.store(out_ptr + t * stride_ot + h, out.to(out_ptr.dtype.element_ty), mask=h < H)

"""Two hand-written gradients that make training on a CPU bearable.

`experts` computes a layer's routed experts with the tokens sorted by expert, `head_loss` the
cross entropy without ever holding all logits. Both know the backward pass, so no intermediate is
materialised twice. Index names: `t` token, `k` route, `e` expert, `h` hidden, `i` intermediate.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, weight: Tensor, up: Tensor, down: Tensor):
        """x[t,h], chosen[t,k], weight[t,k], up[e,2i,h] (gate rows, then up rows), down[e,h,i]."""
        k = chosen.shape[1]
        rows, slots, spans = _sorted_rows(chosen, up.shape[0])
        ws = weight.new_zeros(len(rows)).index_copy_(0, slots, weight.flatten())
        ws = ws.to(x.dtype).unsqueeze(1)

        xs = x.index_select(0, rows)
        inner = xs.new_empty(len(rows), up.shape[1])
        for e, (a, b) in enumerate(spans):
            torch.mm(xs[a:b], up[e].T, out=inner[a:b])
        gate, lift = inner.chunk(2, dim=1)
        act = F.silu(gate).mul_(lift).mul_(ws)
        out = torch.empty_like(xs)
        for e, (a, b) in enumerate(spans):
            torch.mm(act[a:b], down[e].T, out=out[a:b])
        ctx.save_for_backward(xs, inner, act, ws, up, down, rows, slots)
        ctx.spans = spans
        return _add_routes(out, slots, k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        xs, inner, act, ws, up, down, rows, slots = ctx.saved_tensors
        k = len(slots) // len(grad)
        grads = grad.contiguous().index_select(0, rows)
        d_act = torch.empty_like(act)
        d_down = torch.zeros_like(down)
        for e, (a, b) in enumerate(ctx.spans):
            if a < b:
                torch.mm(grads[a:b], down[e], out=d_act[a:b])
                torch.mm(grads[a:b].T, act[a:b], out=d_down[e])
        gate, lift = inner.chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_lift = d_act * silu
        d_weight = (d_lift * lift).sum(1, dtype=torch.float32)
        d_lift.mul_(ws)
        # silu'(g) = s + silu(g) (1 - s)
        d_gate = torch.addcmul(sigmoid, silu, 1 - sigmoid).mul_(d_act).mul_(lift).mul_(ws)
        d_inner = torch.cat((d_gate, d_lift), dim=1)
        d_xs = torch.empty_like(xs)
        d_up = torch.zeros_like(up)
        for e, (a, b) in enumerate(ctx.spans):
            if a < b:
                torch.mm(d_inner[a:b], up[e], out=d_xs[a:b])
                torch.mm(d_inner[a:b].T, xs[a:b], out=d_up[e])
        d_weight = d_weight.index_select(0, slots).view(-1, k)
        return _add_routes(d_xs, slots, k), None, d_weight, d_up, d_down


def _sorted_rows(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Lay the routes out by expert, each expert's part padded to a multiple of `TILE` rows.

    Returns the token of every row, the row of every route, and each expert's span of rows. A
    padding row belongs to token 0 with weight 0. Few distinct lengths matter: the matrix library
    compiles a kernel for each, which costs more than the product itself.
    """
    k = chosen.shape[1]
    flat, order = chosen.flatten().sort(stable=True)
    count = torch.bincount(flat, minlength=experts)
    padded = (count + TILE - 1) // TILE * TILE
    ends = padded.cumsum(0)
    shift = (ends - padded) - (count.cumsum(0) - count)
    place = torch.arange(len(order)) + shift[flat]
    rows = torch.zeros(int(ends[-1]), dtype=torch.long).index_copy_(0, place, order // k)
    slots = torch.empty_like(order).index_copy_(0, order, place)
    return rows, slots, list(zip((ends - padded).tolist(), ends.tolist(), strict=True))


def _add_routes(rows: Tensor, slots: Tensor, k: int) -> Tensor:
    """Sum the k rows of every token."""
    return F.embedding_bag(slots.view(-1, k), rows, mode="sum")


class _HeadLoss(torch.autograd.Function):
    CHUNK = 1024

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, target: Tensor):
        d_x = torch.empty_like(x)
        d_head = torch.zeros(head.shape, dtype=torch.float32)
        total = 0.0
        for a in range(0, len(x), _HeadLoss.CHUNK):
            part = x[a : a + _HeadLoss.CHUNK]
            goal = target[a : a + _HeadLoss.CHUNK, None]
            log_p = torch.log_softmax(part @ head.T, dim=1, dtype=torch.float32)
            total -= log_p.gather(1, goal).sum().item()
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, goal, torch.full(goal.shape, -1.0))
            d_logits = d_logits.to(x.dtype)
            torch.mm(d_logits, head, out=d_x[a : a + len(part)])
            d_head += d_logits.T @ part
        ctx.save_for_backward(d_x, d_head)
        return torch.tensor(total / len(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        d_x, d_head = ctx.saved_tensors
        scale = grad / len(d_x)
        return d_x * scale.to(d_x.dtype), (d_head * scale).bfloat16(), None


experts = _Experts.apply
head_loss = _HeadLoss.apply

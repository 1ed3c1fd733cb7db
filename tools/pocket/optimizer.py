"""The optimiser: Muon for the matrices inside the layers, AdamW for everything else.

Muon takes a momentum step whose matrix is replaced by the nearest orthogonal one, so every
direction of a weight learns at the same pace. Experts see few tokens each, and gain most. All
matrices of one shape are orthogonalised as one batch.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

# An odd quintic whose iteration drives singular values of (0, 1] into a band around one.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """x[b,r,c] in bfloat16, replaced by the nearest matrices with orthonormal rows or columns."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.float().square().sum((1, 2), keepdim=True).sqrt() + 1e-7).to(x.dtype)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    def __init__(self, params: list[Tensor], momentum: float = 0.95, decay: float = 0.1) -> None:
        self.momentum, self.decay = momentum, decay
        self.by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            self.by_shape[p.shape[-2:]].append(p)
        self.velocity = {p: torch.zeros_like(p) for p in params}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (rows, cols), params in self.by_shape.items():
            for p in params:
                self.velocity[p].lerp_(p.grad, 1 - self.momentum)
            ahead = [p.grad.lerp(self.velocity[p], self.momentum).bfloat16() for p in params]
            turned = orthogonal(torch.cat([a.view(-1, rows, cols) for a in ahead]))
            # An orthogonal matrix has elements of size 1/sqrt(longer side): scale them to 0.2.
            size = 0.2 * max(rows, cols) ** 0.5
            parts = turned.split([p.numel() // (rows * cols) for p in params])
            for p, part in zip(params, parts, strict=True):
                p.mul_(1 - lr * self.decay).add_(part.reshape(p.shape), alpha=-lr * size)


class Optimizer:
    """Both optimisers behind one learning-rate factor between 0 and 1.

    `share` picks the parameters that this worker updates; the others are left to its colleagues.
    """

    def __init__(
        self, share: list[tuple[str, nn.Parameter]], *, matrix_lr: float, other_lr: float
    ) -> None:
        self.matrix_lr, self.other_lr = matrix_lr, other_lr
        named = share
        inner = [p for n, p in named if p.dim() > 1 and "embed" not in n and "router" not in n]
        known = set(inner)
        self.muon = Muon(inner)
        self.adam = torch.optim.AdamW(
            [p for _, p in named if p not in known],
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        )

    def step(self, factor: float) -> None:
        self.muon.step(self.matrix_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * factor
        self.adam.step()

"""Workers that train one model together: the weights and gradients lie in shared memory.

Every worker computes gradients of its own batch into its own row, all rows are averaged by
everyone, and each worker updates its share of the weights in place. They meet twice per step:
before the rows are read, and before the new weights are used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import multiprocessing as mp

CLIP = 1.0


class Gradients:
    def __init__(self, model: nn.Module, workers: int) -> None:
        self.model = model
        size = sum(p.numel() for p in model.parameters())
        self.rows = torch.zeros(workers, size).share_memory_()
        self.progress = torch.zeros(1, dtype=torch.float64).share_memory_()
        self.barrier = mp.get_context("spawn").Barrier(workers)
        self.mean: Tensor | None = None

    def meet(self) -> None:
        self.barrier.wait()

    def _point(self, flat: Tensor) -> None:
        params = list(self.model.parameters())
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)

    def collect(self, rank: int, loss: Tensor) -> None:
        self._point(self.rows[rank].zero_())
        loss.backward()

    def average(self) -> None:
        """Leaves the clipped mean of all rows in every parameter's `grad`."""
        self.mean = torch.mean(self.rows, dim=0)
        self.mean.mul_((CLIP / (self.mean.norm() + 1e-6)).clamp(max=1.0))
        self._point(self.mean)


def launch(work: Callable[..., None], workers: int, args: Any, model: nn.Module) -> None:
    """Runs `work(rank, args, model, gradients)` in every worker and waits for all of them."""
    model.share_memory()
    mp.spawn(work, (args, model, Gradients(model, workers)), nprocs=workers)

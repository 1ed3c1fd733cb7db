"""LongCat-Flash: experts beyond those with weights return what they are given."""

from __future__ import annotations

from typing import Any

import torch

from moeinf.integrations.transformers.families.adapter import Adapter, Experts


class LongcatFlash(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        mine = old.experts
        self.router, self.count = old.router, mine.num_routed_experts
        size = (self.count, mine.intermediate_size, mine.hidden_size)
        self.experts = Experts(config, mine.act_fn, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        *_, weights, ids = self.router(tokens)
        same = ids >= self.count
        routed = self.experts(tokens, ids.masked_fill(same, self.count), weights)
        share = (weights * same).sum(-1, keepdim=True)
        return (routed + (tokens * share).to(tokens.dtype)).view(hidden.shape)

"""Llama 4: the router's score multiplies what an expert is given, not what it gives."""

from __future__ import annotations

from typing import Any

import torch

from moeinf.integrations.transformers.families.adapter import Adapter, Experts


class Llama4(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        mine = old.experts
        size = (mine.num_experts, mine.expert_dim, mine.hidden_size)
        self.top_k = old.top_k
        self.router, self.shared_expert = old.router, old.shared_expert
        self.experts = Experts(config, mine.act_fn, size, is_transposed=True)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(hidden)
        out = self.shared_expert(hidden)
        for score, ids in zip(*(one.split(1, -1) for one in scores.topk(self.top_k)), strict=True):
            out = out + self.experts(hidden * score, ids, torch.ones_like(score))
        return out, logits

"""JetMoE. Its attention has experts too; those stay with the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import WeightRenaming

from moeinf.integrations.transformers.families.adapter import Adapter, Experts


class JetMoe(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        self.router, self.bias = old.router, old.bias
        size = (old.router.num_experts, old.hidden_size, old.input_size)
        self.routed = Experts(config, old.activation, size)

    @classmethod
    def renamings(cls) -> list[Any]:
        return [
            WeightRenaming(r"mlp\.input_linear\.weight", "mlp.routed.gate_up_proj"),
            WeightRenaming(r"mlp\.output_linear\.weight", "mlp.routed.down_proj"),
        ]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        order, _, gates, counts, _ = self.router(tokens)  # routes by expert, and how many each has
        counts = torch.tensor(counts, device=order.device)
        experts = torch.arange(len(counts), device=order.device).repeat_interleave(counts)
        ids, weights = torch.empty_like(order), torch.empty_like(gates)
        ids[order], weights[order] = experts, gates
        routed = self.routed(tokens, ids.view(len(tokens), -1), weights.view(len(tokens), -1))
        return (routed + self.bias).view(hidden.shape)

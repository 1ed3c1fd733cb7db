"""Switch Transformers: one expert for each token, or none where its expert has no capacity left."""

from __future__ import annotations

from typing import Any

import torch

from moeinf.integrations.transformers.families.adapter import Adapter, Experts, check_dropout, stack


class SwitchTransformers(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        one = old["expert_0"]
        size = (len(old), *one.wi.weight.shape)
        self.dropout = one.dropout.p
        self.routed = Experts(config, one.act, size, has_gate=False, top_k=1)

    @classmethod
    def renamings(cls) -> list[Any]:
        return [
            stack("mlp.experts.*.wi.weight", "mlp.experts.routed.up_proj"),
            stack("mlp.experts.*.wo.weight", "mlp.experts.routed.down_proj"),
        ]

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: Any) -> Any:
        """hidden [T, H], chosen [T, 1, experts] of 0 and 1, weights [T, 1]."""
        check_dropout(self, self.dropout)
        ids = chosen.argmax(-1).masked_fill(chosen.sum(-1) == 0, chosen.shape[-1])
        return self.routed(hidden, ids, weights)

"""NLLB-MoE: two experts for each token, fewer where they have no capacity left.

transformers 5's own code takes the mask of the first experts for their ids, so that only experts 0
and 1 are run. Here the experts run that the router chose, as in the published model.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from moeinf.integrations.transformers.families.adapter import Adapter, Experts, check_dropout, stack


class NllbMoe(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        warnings.warn(
            "NLLB-MoE: moeinf runs the experts that the router chooses, as the published model "
            "does; transformers' own forward runs experts 0 and 1 alone",
            stacklevel=2,
        )
        one = old["expert_0"]
        size = (old.num_experts, *one.fc1.weight.shape)
        self.dropout, self.token_dropout = one.dropout.p, old.moe_token_dropout
        self.routed = Experts(config, one.act, size, has_gate=False, has_bias=True, top_k=2)

    @classmethod
    def renamings(cls) -> list[Any]:
        return [
            stack(f"ffn.experts.*.{layer}.{end}", f"ffn.experts.routed.{matrix}_proj{suffix}")
            for layer, matrix in (("fc1", "up"), ("fc2", "down"))
            for end, suffix in (("weight", ""), ("bias", "_bias"))
        ]

    def forward(self, hidden: torch.Tensor, _: torch.Tensor, weights: torch.Tensor) -> Any:
        """hidden [T, H], weights [T, experts], 0 where an expert was not chosen."""
        check_dropout(self, self.dropout, self.token_dropout)
        count = weights.shape[-1]
        chosen, ids = weights.topk(min(2, count))
        ids = ids.masked_fill(chosen == 0, count)
        return self.routed(hidden, ids, chosen * (1 - self.token_dropout))

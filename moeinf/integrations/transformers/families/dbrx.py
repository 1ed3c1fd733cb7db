"""DBRX: the experts of a layer lie one after another in matrices [experts * I, H]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

from moeinf.checkpoint.headers import TensorEntry
from moeinf.integrations.transformers.families.adapter import Adapter, Experts


class Dbrx(Adapter):
    def __init__(self, old: Any, config: Any):
        super().__init__(old, config)
        self.count = old.num_experts
        size = (old.num_experts, old.ffn_hidden_size, old.hidden_size)
        top_k = config.ffn_config.moe_top_k
        self.routed = Experts(config, old.mlp.activation_fn, size, top_k=top_k)

    @classmethod
    def renamings(cls) -> list[Any]:
        mlp, routed = "ffn.experts.mlp", "ffn.experts.routed"
        both: list[Any] = [Concatenate(dim=1)]
        gate_up = [f"{mlp}.w1", f"{mlp}.v1"]
        return [
            WeightConverter(gate_up, f"{routed}.gate_up_proj", operations=both),
            WeightConverter(f"{mlp}.w2", f"{routed}.down_proj", operations=[Transpose(1, 2)]),
        ]

    def view(self, entry: TensorEntry) -> TensorEntry:
        count = self.count
        if ".ffn.experts.mlp." not in entry.name or entry.shape[0] % count:
            return entry
        return replace(entry, shape=(count, entry.shape[0] // count, *entry.shape[1:]))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        return self.routed(hidden.reshape(-1, hidden.shape[-1]), ids, weights).view(hidden.shape)

"""What a model's routing looks like to an expert cache: load, skew and how long it stays put."""

from typing import Any

import torch
from torch import Tensor


class Routing:
    """Collects the chosen experts of one layer; `add` takes routes [n,k] of consecutive tokens."""

    def __init__(self, experts: int, top_k: int) -> None:
        self.experts, self.top_k = experts, top_k
        self.count = torch.zeros(experts, dtype=torch.long)
        self.kept = self.pairs = 0
        self.distinct: list[int] = []

    def add(self, chosen: Tensor) -> None:
        used = torch.zeros(len(chosen), self.experts, dtype=torch.long).scatter_(1, chosen, 1)
        self.count += used.sum(0)
        self.kept += int((used[1:] & used[:-1]).sum())
        self.pairs += (len(chosen) - 1) * self.top_k
        whole = len(chosen) // 64 * 64
        self.distinct += used[:whole].view(-1, 64, self.experts).amax(1).sum(1).tolist()

    def summary(self) -> dict[str, Any]:
        share = self.count / self.count.sum()
        ordered = share.sort(descending=True).values
        return {
            "load": [round(v, 4) for v in share.tolist()],
            "busiest_over_mean": round(float(ordered[0] * self.experts), 2),
            "idlest_over_mean": round(float(ordered[-1] * self.experts), 3),
            "busiest_quarter_share": round(float(ordered[: self.experts // 4].sum()), 3),
            # exp(entropy): as many equally busy experts would be as hard to predict
            "effective_experts": round(
                float((-(share * share.clamp_min(1e-9).log()).sum()).exp()), 1
            ),
            "adjacent_overlap": round(self.kept / self.pairs, 3),
            # the overlap if every token drew its experts by load alone
            "overlap_by_load_alone": round(float(self.top_k * share.square().sum()), 3),
            "distinct_in_64_tokens": round(sum(self.distinct) / len(self.distinct), 1),
        }

"""Routers of a few tokens on the CPU: the choice of experts and their weights in one call.

Logits and probabilities stay torch's. Probabilities are often equal, for logits in bf16 are: which
of them is chosen follows from torch's sort. So a trial compares many such rows first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from moeinf import _core
from moeinf.experts.marks import is_plain_call
from moeinf.integrations.transformers.norms import same_bits
from moeinf.integrations.transformers.own_source import (
    Function,
    OwnForward,
    is_own,
    served_class,
)

CHOICE = "router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)"
SHARE = "router_top_value /= router_top_value.sum(dim=-1, keepdim=True)"
IF_WANTED = f"if self.norm_topk_prob:\n    {SHARE}"
ROUND = "router_top_value = router_top_value.to(router_logits.dtype)"
# Statements, whether the weights are divided by their sum, and the tensor that has their type.
WRITTEN = (
    ([CHOICE, IF_WANTED, ROUND], "self.norm_topk_prob", "router_logits"),  # Qwen2Moe, Qwen3Moe
    ([CHOICE, SHARE, ROUND], "True", "router_logits"),  # Qwen3.5-MoE, Qwen3-VL-MoE
    ([CHOICE, SHARE], "True", "router_probs"),  # Mixtral, MiniMax-Text
)
MOST_TOKENS = 16
TRIAL = (1, MOST_TOKENS)  # tokens
LEVELS = (1, 8, 1 << 20)  # of logits between one integer and the next
TRIALS = 2  # of each of these, and of each type


class _Router:
    """A base of the classes of routers that are served."""

    moeinf_top_k = staticmethod(_core.top_k)

    def forward(self: Any, hidden_states: Any, *others: Any, **named: Any) -> Any:
        """As the model's own; see `OwnForward`."""
        few = hidden_states.shape[:-1].numel() <= MOST_TOKENS
        if few and is_plain_call(hidden_states) and is_own(self):
            found = self.moeinf_rest(hidden_states, *others, **named)
            if found is not None:
                return found
        return super().forward(hidden_states, *others, **named)  # type: ignore[misc]


def serve_routers(model: torch.nn.Module) -> None:
    """Serves every router whose statements are known and of which a trial has the same bits.

    Parameters, hooks and names stay.
    """
    for module in model.modules():
        kind: Any = type(module)
        weight = module._parameters.get("weight")
        if weight is None or not hasattr(module, "top_k") or not weight.is_cpu:
            continue
        rest = _rest(kind, kind.forward)
        if rest is not None and _chooses_like_torch(weight.shape[0], module.top_k):
            module.__class__ = served_class(_Router, kind, rest)


@cache
def _rest(base: type, forward: Function) -> Function | None:
    """The forward with one call in the place of the choice. It returns None where that cannot be,
    and has changed nothing then."""
    try:
        own = OwnForward(base)
    except ValueError:
        return None
    for statements, shares, like in WRITTEN:
        if (at := own.find(statements)) >= 0:
            choice = [
                f"moeinf_made = self.moeinf_top_k(router_probs, {like}, self.top_k, {shares})",
                "if moeinf_made is None: return None",
                "router_top_value, router_indices = moeinf_made",
            ]
            return own.with_body([*own.body[:at], *choice, *own.body[at + len(statements) :]])
    return None


@cache
def _chooses_like_torch(experts: int, top_k: int) -> bool:
    """For random rows of which few numbers, many, or all differ."""
    if not 0 < top_k <= experts:
        return False
    draw = torch.Generator("cpu").manual_seed(0)
    return all(
        _is_same(torch.randn(tokens, experts, generator=draw, device="cpu"), levels, top_k, dtype)
        for _ in range(TRIALS)
        for tokens in TRIAL
        for levels in LEVELS
        for dtype in (torch.float32, torch.bfloat16)
    )


def _is_same(logits: torch.Tensor, levels: float, top_k: int, dtype: torch.dtype) -> bool:
    with torch.no_grad():
        like = (logits * levels).round().div(levels).to(dtype)
        probabilities = torch.softmax(like, dim=-1, dtype=torch.float32)
        for share_out in (False, True):
            found = _core.top_k(probabilities, like, top_k, share_out)
            weights, ids = torch.topk(probabilities, top_k, dim=-1)
            if share_out:
                weights /= weights.sum(dim=-1, keepdim=True)
            if found is None or not same_bits(found[0], weights.to(dtype)):
                return False
            if not torch.equal(found[1], ids):
                return False
    return True

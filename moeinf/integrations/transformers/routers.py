"""The routers' probabilities of all experts, taken from the forward passes of a model.

Forward hooks on the routers of its MoE blocks see their outputs; the model does not change. The
hooks exist only during `ExpertCache.record(router=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.blocks import Trial, try_router

TOLERANCE = 0.02
"""Of the chosen experts' shares: weights may have been rounded to bfloat16."""


def listen(blocks: Sequence[Any], sink: Callable[[int, torch.Tensor], None]) -> Callable[[], None]:
    """Calls `sink(layer, probabilities [T, num_experts])` whenever the router of `blocks[layer]`
    has run. Returns a function that ends it.

    Raises:
        UnsupportedError: a block whose router is not known, or one that makes something else of its
            logits than softmax or sigmoid.
    """
    listeners = [_Listener(layer, try_router(block), sink) for layer, block in enumerate(blocks)]
    hooks = [one.router.register_forward_hook(one) for one in listeners]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return stop


class _Listener:
    """A forward hook on one router."""

    def __init__(self, layer: int, trial: Trial, sink: Callable[[int, torch.Tensor], None]):
        self.layer = layer
        self.sink = sink
        self.router = trial.router.module
        logits = _logits(trial.output)
        self.score = _score_of(trial.router.block, self.router, logits)
        _check(type(self.router).__name__, self.score(logits), trial.ids, trial.weights)

    def __call__(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self.sink(self.layer, self.score(_logits(output)))


def _logits(output: Any) -> torch.Tensor:
    """[T, num_experts], what a router returns first."""
    logits: torch.Tensor = (output if isinstance(output, torch.Tensor) else output[0]).detach()
    return logits.reshape(-1, logits.shape[-1])


def _score_of(
    block: Any, router: torch.nn.Module, logits: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """How this router turns what it returns first into probabilities."""
    if hasattr(router, "e_score_correction_bias") or hasattr(block, "e_score_correction_bias"):
        return _sigmoid  # DeepSeek-V3 and what follows it
    sums = logits.float().sum(-1)
    if bool((logits >= 0).all() and (sums - 1).abs().max() < TOLERANCE):
        return _as_they_are  # transformers 5.0 returns probabilities
    return _softmax


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(logits.float())


def _as_they_are(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities


def _check(router: str, scores: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """A token's weights, whether scaled or not, share it out as the scores of its experts do."""
    weights = weights.float()
    picked = scores.float().gather(-1, ids)
    found = picked / picked.sum(-1, keepdim=True)
    expected = weights / weights.sum(-1, keepdim=True)
    wrong = (found - expected).abs() > TOLERANCE  # never where one is NaN: fused_experts refuses it
    if bool(wrong.any()):
        raise UnsupportedError(
            f"{router}: expected weights in proportion to softmax or sigmoid of its logits, found "
            "others; its probabilities cannot be recorded"
        )

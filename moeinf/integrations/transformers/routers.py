"""The routers' probabilities of all experts, taken from the forward passes of a model.

Forward hooks on the routers of its MoE blocks see their outputs; the model does not change. The
hooks exist only during `ExpertCache.record(router=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.blocks import block_form

TOLERANCE = 0.02
"""Of the chosen experts' shares: weights may have been rounded to bfloat16."""


def listen(blocks: Sequence[Any], sink: Callable[[int, torch.Tensor], None]) -> Callable[[], None]:
    """Calls `sink(layer, probabilities [T, num_experts])` whenever the router of `blocks[layer]`
    has run. Returns a function that ends it.

    Raises:
        UnsupportedError: a block whose router is not known; while running, a router that makes
            something else of its logits than softmax or sigmoid.
    """
    routers = [getattr(block, block_form(block).gate) for block in blocks]
    hooks = [
        router.register_forward_hook(_Listener(layer, block, sink))
        for layer, (block, router) in enumerate(zip(blocks, routers, strict=True))
    ]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return stop


class _Listener:
    """A forward hook on one router."""

    def __init__(self, layer: int, block: Any, sink: Callable[[int, torch.Tensor], None]):
        self.layer = layer
        self.block = block
        self.sink = sink
        self.score: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, router: torch.nn.Module, _: Any, output: Any) -> None:
        several = not isinstance(output, torch.Tensor)
        logits = (output[0] if several else output).detach()
        if logits.ndim != 2:
            logits = logits.reshape(-1, logits.shape[-1])
        if self.score is None:
            self.score = _score_of(self.block, router, logits)
            if several:
                _check(type(router).__name__, self.score(logits), *(x.detach() for x in output[1:]))
        self.sink(self.layer, self.score(logits))


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


def _check(router: str, scores: torch.Tensor, *chosen: torch.Tensor) -> None:
    """A token's weights, whether scaled or not, share it out as the scores of its experts do."""
    ids = next(tensor for tensor in chosen if not tensor.is_floating_point())
    weights = next(tensor for tensor in chosen if tensor.is_floating_point()).float()
    if weights.shape != ids.shape:  # one column per expert
        weights = weights.gather(-1, ids)
    picked = scores.float().gather(-1, ids)
    found = picked / picked.sum(-1, keepdim=True)
    expected = weights / weights.sum(-1, keepdim=True)
    wrong = (found - expected).abs() > TOLERANCE  # never where one is NaN: fused_experts refuses it
    if bool(wrong.any()):
        raise UnsupportedError(
            f"{router}: expected weights in proportion to softmax or sigmoid of its logits, found "
            "others; its probabilities cannot be recorded"
        )

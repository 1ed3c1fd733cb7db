"""MoE blocks of transformers: the router and the shared experts among a block's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moeinf.errors import UnsupportedError


@dataclass(frozen=True)
class BlockForm:
    """Names of a MoE block's modules; a block has a form if it has all that are not None."""

    gate: str
    shared: str | None = None
    shared_gate: str | None = None
    """A linear map to one number per token; the shared output is scaled by its sigmoid."""

    def fits(self, block: torch.nn.Module) -> bool:
        wanted = (self.gate, self.shared, self.shared_gate)
        return all(isinstance(getattr(block, n, None), torch.nn.Module) for n in wanted if n)


FORMS = (
    BlockForm("gate", "shared_expert", "shared_expert_gate"),  # Qwen2
    BlockForm("gate", "shared_experts"),  # DeepSeek
    BlockForm("gate"),  # Qwen3, Mixtral, OLMoE
)


def block_form(block: Any) -> BlockForm:
    """Raises UnsupportedError for a block of none of the forms."""
    for form in FORMS:
        if form.fits(block):
            return form
    raise UnsupportedError(
        f"{type(block).__name__}: it is not known where its router is, which prefetch='gate' and "
        "recording its probabilities need"
    )


def route(block: Any, form: BlockForm, hidden: torch.Tensor) -> torch.Tensor:
    """The experts [T, k] that a block's router chooses for hidden [..., H]."""
    output = getattr(block, form.gate).forward(hidden.reshape(-1, hidden.shape[-1]))
    if isinstance(output, torch.Tensor):  # logits only: the block itself chooses
        output = block.route_tokens_to_experts(output)
    choices: torch.Tensor = next(one for one in output if not one.is_floating_point())
    return choices

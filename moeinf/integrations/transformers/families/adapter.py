"""What adapters are made of."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import MergeModulelist, WeightConverter

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import UnsupportedError


class Experts(torch.nn.Module):
    """All experts of a layer, as transformers' interface has them, on the meta device.

    up_proj is [experts, I, H], or gate_up_proj [experts, 2I, H] with gates; down_proj [experts, H,
    I]. `is_transposed`: the last two dimensions change places.
    """

    is_concatenated = True

    def __init__(
        self,
        config: Any,
        act_fn: Any,
        size: tuple[int, int, int],
        *,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        top_k: int | None = None,
    ):
        """`size` is (experts, I, H). `top_k`: of a token, where the configuration does not say."""
        super().__init__()
        self.config, self.top_k = config, top_k
        self.act_fn = act_fn
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        experts, inner, hidden = size
        name, rows = ("gate_up_proj", 2 * inner) if has_gate else ("up_proj", inner)
        for matrix, shape in ((name, (rows, hidden)), ("down_proj", (hidden, inner))):
            if has_bias:
                self._add(f"{matrix}_bias", experts, shape[0])
            self._add(matrix, experts, *(shape[::-1] if is_transposed else shape))

    def _add(self, name: str, *shape: int) -> None:
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = self.act_fn(gate) * up
        return activated


class Adapter(torch.nn.Module):
    """A module in the place of one of the family's. It is made of that one and of the model's
    configuration, and has the experts in a child."""

    def __init__(self, old: Any, config: Any):
        super().__init__()

    @classmethod
    def renamings(cls) -> list[Any]:
        """Which tensors of the files become which parameter, as transformers' mapping has it."""
        return []

    def view(self, entry: TensorEntry) -> TensorEntry:
        """A tensor of the files, of the shape that `renamings` starts from."""
        return entry


def stack(tensor: str, parameter: str) -> WeightConverter:
    """The parameter [experts, ...] is made of one tensor for each expert."""
    return WeightConverter(tensor, parameter, operations=[MergeModulelist(dim=0)])


def check_dropout(module: torch.nn.Module, *shares: float) -> None:
    """Raises UnsupportedError where training would drop values inside the experts."""
    if module.training and any(shares):
        raise UnsupportedError(
            f"{type(module).__name__}: dropout inside experts is {max(shares)}, expected 0 to train"
        )

"""Families of transformers that do not use its experts interface, made to look as if they did.

`adapt` replaces modules of a model on the meta device by an adapter. An adapter holds its experts
in a module of the interface's kind, turns what the family's code hands it into ids and weights, and
says under which names the weights lie in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.families.adapter import Adapter
from moeinf.integrations.transformers.families.dbrx import Dbrx
from moeinf.integrations.transformers.families.jetmoe import JetMoe
from moeinf.integrations.transformers.families.llama4 import Llama4
from moeinf.integrations.transformers.families.longcat_flash import LongcatFlash
from moeinf.integrations.transformers.families.nllb_moe import NllbMoe
from moeinf.integrations.transformers.families.step3p7 import Step3p7
from moeinf.integrations.transformers.families.switch_transformers import SwitchTransformers

# By the class in transformers that an adapter replaces.
ADAPTERS: dict[str, Callable[[Any, Any], torch.nn.Module]] = {
    "DbrxExperts": Dbrx,
    "JetMoeMoE": JetMoe,
    "Llama4TextMoe": Llama4,
    "LongcatFlashMoE": LongcatFlash,
    "NllbMoeExperts": NllbMoe,
    "Step3p7Experts": Step3p7,
    "SwitchTransformersExperts": SwitchTransformers,
}

# Families with experts that are not served, by model type, and why.
NOT_SERVED = {
    "doge": "each of its experts is two vectors of embeddings, too small to be read one by one",
}


def adapt(model: torch.nn.Module) -> None:
    """Replaces modules of families that have an adapter."""
    for path, module in list(model.named_modules()):
        kind = ADAPTERS.get(type(module).__name__)
        if kind is None or not type(module).__module__.startswith("transformers.models."):
            continue
        parent, _, name = path.rpartition(".")
        block: Any = model.get_submodule(parent)
        setattr(block, name, kind(module, model.config))
        if not block._parameters and not block._buffers:
            block._is_hf_initialized = True  # it draws the parameters of its experts


def renamings(model: torch.nn.Module) -> list[Any]:
    """What transformers' mapping lacks for the adapters of a model."""
    kinds = {type(module) for module in model.modules() if isinstance(module, Adapter)}
    return [one for kind in kinds for one in kind.renamings()]


def views(model: torch.nn.Module, entries: Iterable[TensorEntry]) -> Iterable[TensorEntry]:
    """The tensors of the files, as the adapter of a model sees them."""
    adapter = next((module for module in model.modules() if isinstance(module, Adapter)), None)
    return entries if adapter is None else map(adapter.view, entries)


def check_served(model_type: str) -> None:
    """Raises UnsupportedError for a family that has experts, but none that can be served."""
    if model_type in NOT_SERVED:
        raise UnsupportedError(f"model_type {model_type!r} is not served: {NOT_SERVED[model_type]}")

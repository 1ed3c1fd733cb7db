"""Tiny random configurations of every family of the installed transformers that has experts."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODELS = Path(transformers.__file__).parent / "models"

# Sizes by the name of a configuration's field, wherever it occurs.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "moe_hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def families() -> list[str]:
    """The folders of transformers whose experts use the interface."""
    return sorted(
        path.parent.name
        for path in MODELS.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text("utf-8"), re.MULTILINE)
    )


@functools.cache
def model_types(family: str) -> list[str]:
    """The model types whose configuration is defined in the family's folder."""
    return [name for name, cls in CONFIG_MAPPING.items() if cls.__module__.split(".")[-2] == family]


def fields(cls: Any) -> dict[str, Any]:
    return {k: v for k, v in cls().__dict__.items()}


def tiny(cls: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a small configuration of this class."""
    known = fields(cls)
    known |= {name: None for name in getattr(cls, "attribute_map", {})}
    made = {name: value for name, value in SIZES.items() if name in known}
    for name, sub in cls.sub_configs.items():
        if name in known and hasattr(sub, "model_type") and sub.model_type:
            made[name] = tiny(sub, changes.get(name, {}))
    made |= {k: v for k, v in changes.items() if not isinstance(v, dict) or k not in made}
    return made

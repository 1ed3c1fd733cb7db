"""Small random checkpoints in the formats of real families, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}

# What differs from COMMON; 24 is the intermediate size of an expert everywhere.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "head_dim": 10, "intermediate_size": 48},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 32, "intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "olmoe": {"num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 24},
    "deepseek_v2": {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                    "intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts": 1,
                    "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
                    "num_key_value_heads": 4},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                    "intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts": 1,
                    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1,
                    "num_key_value_heads": 4},
}  # fmt: skip

# Families whose experts compute something else than act(gate) * up. A limit of 0.5 clamps often.
OWN_GATES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 16,
                    "num_key_value_heads": 1, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2,
                    "qk_rope_head_dim": 8, "swiglu_limit": 0.5},
    "hy_v4": {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2,
              "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 10,
              "pad_token_id": 0, "swiglu_limit": 0.5},
    "minimax_m3_vl_text": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16,
                           "intermediate_size": 24, "rotary_dim": 8, "swiglu_limit": 0.5},
}  # fmt: skip


def write_checkpoint(
    folder: Path,
    family: str = "qwen3_moe",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "100MB",
    original_names: bool = True,
    **changes: Any,
) -> Path:
    """A random checkpoint of `family`; `original_names=False` keeps the experts fused."""
    torch.manual_seed(seed)
    own = (FAMILIES | OWN_GATES).get(family, {})
    config = AutoConfig.for_model(family, **{**COMMON, **own, **changes})
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=original_names
    )
    return folder

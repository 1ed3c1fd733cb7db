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
    "vocab_size_per_layer_input": 99,
    "unpadded_vocab_size": 97,
    "hidden_size": 32,
    "text_hidden_size": 32,
    "out_hidden_size": 32,
    "output_proj_dims": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "moe_hidden_size": 24,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 20,
    "projection_intermediate_size": 20,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "shared_experts_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
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
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "n_groups": 2,
    "router_hidden_size": 16,
    "max_position_embeddings": 128,
    "position_embedding_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "thinker_hidden_size": 32,
    "num_code_groups": 4,
    "num_quantizers": 4,
    "codebook_size": 16,
    "decoder_dim": 32,
    "canvas_length": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Of one model type, where the family does not take the sizes above.
CHANGES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2,
                    "moe_intermediate_size": 20, "num_hidden_layers": 6},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2,
                           "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [20, 12],
                             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                 "mrope_section": [1, 1, 2]}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 8, "indexer_compress_ratio": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "muse_spark_audio": {"patch_sizes": (16, 6), "hidden_sizes": (16, 32), "depths": (1, 1),
                         "num_hidden_layers": 2},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                          "mrope_section": [2, 1, 1]}},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
                        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
                        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "nemotron_h": {"use_mamba_kernels": False},
    "bailing_hybrid": {"layer_group_size": 4},
    "kimi_linear": {"layer_types": ["linear_attention"] * 3 + ["full_attention"],
                    "linear_head_dim": 8, "linear_num_heads": 4},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                       "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "mistral4": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "head_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
}  # fmt: skip


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


def tiny(cls: Any) -> dict[str, Any]:
    """Arguments for a small configuration of this class, of its parts too."""
    known = dict.fromkeys(getattr(cls, "attribute_map", {})) | vars(cls())
    made = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        made["num_key_value_heads"] = made["num_attention_heads"]
    for name in cls.sub_configs:
        part = known.get(name)
        if getattr(part, "model_type", None):
            made[name] = {"model_type": part.model_type, **tiny(type(part))}
    return made | CHANGES.get(cls.model_type, {})

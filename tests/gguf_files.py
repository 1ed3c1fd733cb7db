"""Small random GGUF files, with the keys, names and orders that llama.cpp's converter writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import COMMON
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 97
SIZES: dict[str, Any] = {**COMMON, "vocab_size": TOKENS, "hidden_size": 64}
# What differs from SIZES, by architecture of the file.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 96, "head_dim": 16, "intermediate_size": 128,
                 "norm_topk_prob": True},
    "qwen2moe": {"model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 3,
                 "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160,
                 "intermediate_size": 128},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2,
                "intermediate_size": 96, "head_dim": 16, "sliding_window": 8,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 150000.0,
                                    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                    "original_max_position_embeddings": 32}},
    "minimax-m2": {"model_type": "minimax_m2", "num_local_experts": 6, "num_experts_per_tok": 2,
                   "intermediate_size": 96, "head_dim": 16, "rotary_dim": 8},
    "qwen35moe": {"model_type": "qwen3_5_moe_text", "num_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64,
                  "head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2,
                  "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                      "partial_rotary_factor": 0.25, "mrope_interleaved": True,
                                      "mrope_section": [2, 1, 1]}},
}  # fmt: skip


# Names that the table of gguf-py has not, by the last word of the model's.
BARE = {"e_score_correction_bias": "exp_probs_b.bias", "dt_bias": "ssm_dt.bias", "A_log": "ssm_a"}


# Where the numbers of a block lie, of the types that gguf-py cannot quantise.
PLACES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2),
          Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,)}  # fmt: skip


def make_model(architecture: str, seed: int, **changes: Any) -> Any:
    """A random model in float32, as transformers has it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**SIZES, **FAMILIES[architecture], **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        if one.dim() > 1 or "bias" in name or "sinks" in name:
            torch.nn.init.normal_(one, std=0.2)
        elif "norm" in name:
            torch.nn.init.normal_(one, mean=1.0, std=0.1)
    return model.eval()


def stored(values: np.ndarray[Any, Any], kind: Kind) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """An array as it lies in the file, and the float32 that it stands for."""
    raw = random_blocks(values, kind) if kind in PLACES else gguf.quants.quantize(values, kind)
    return raw, torch.from_numpy(gguf.quants.dequantize(raw, kind).copy()).view(values.shape)


def random_blocks(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Blocks of random codes, whose numbers are as large as `values`: gguf-py cannot quantise
    these types."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    shape = (*values.shape[:-1], values.shape[-1] // elements, size)
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    scale = np.full((*shape[:-1], 1), np.std(values) / 500, dtype=np.float16).view(np.uint8)
    for first in PLACES[kind]:
        raw[..., first : first + 2] = scale
    return raw.reshape(*shape[:-2], -1)


def kind_of_name(experts: Kind, dense: Kind) -> Callable[[str], Kind]:
    """As llama.cpp: vectors, routers and biases stay in F32."""

    def kind(name: str) -> Kind:
        if "_exps.weight" in name:
            return experts
        plain = ("norm", "ffn_gate_inp", "bias", "sinks", "ssm", "exp_probs_b")
        return Kind.F32 if any(word in name for word in plain) else dense

    return kind


def tensors_of(model: Any, architecture: str) -> dict[str, torch.Tensor]:
    """Views of every parameter, by its name in the file."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        base, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = name, "weight"
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        if ".experts." in name:
            found |= _experts(model, f"blk.{layer}.ffn_", name.rpartition(".")[2], value)
        elif base.rpartition(".")[2] in BARE:
            found[f"blk.{layer}.{BARE[base.rpartition('.')[2]]}"] = value
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            known = names.get_name(base)
            assert known is not None, name
            found[f"{known}.{suffix}"] = value[0] if "shared_expert_gate" in name else value
    return found


def _experts(model: Any, prefix: str, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gate and up apart, [experts, outputs, inputs], also where the model has them otherwise."""
    suffix = "bias" if name.endswith("_bias") else "weight"
    module = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    if module.is_transposed and suffix == "weight":
        value = value.transpose(1, 2)
    if name.startswith("down"):
        return {f"{prefix}down_exps.{suffix}": value}
    half = value.shape[1] // 2
    gate, up = value[:, :half], value[:, half:]
    if not getattr(module, "is_concatenated", True):
        gate, up = value[:, 0::2], value[:, 1::2]
    return {f"{prefix}gate_exps.{suffix}": gate, f"{prefix}up_exps.{suffix}": up}


def as_written(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of Qwen3.5 as llama.cpp's converter changes it; of others, as it is."""
    if config.model_type != "qwen3_5_moe_text":
        return value
    if name.endswith("norm.weight") and "ssm" not in name:
        return value + 1
    if name.endswith("ssm_a"):
        value = -value.exp()
    if name.endswith("ssm_conv1d.weight"):
        value = value.squeeze(1)
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    first = 2 * groups * config.linear_key_head_dim if "qkv" in name or "conv1d" in name else 0

    def tiled(rows: torch.Tensor) -> torch.Tensor:
        """Heads in turn, where the model has those of one key head side by side."""
        parts = rows.unflatten(0, (groups, heads // groups, len(rows) // heads))
        return parts.transpose(0, 1).flatten(0, 2)

    if any(word in name for word in ("qkv", "conv1d", "attn_gate", "ssm_a", "ssm_beta", "ssm_dt")):
        return torch.cat([value[:first], tiled(value[first:])])
    return tiled(value.T).T if "ssm_out" in name else value


def add_keys(writer: Any, config: Any) -> None:
    get = config.to_dict().get
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_count(get("num_experts") or get("num_local_experts"))
    if get("intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if get("head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_expert_feed_forward_length(get("moe_intermediate_size") or config.intermediate_size)
    if get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if get("sliding_window") and config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if get("rotary_dim"):
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if get("linear_key_head_dim"):
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(keys)
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_inner_size(config.linear_value_head_dim * values)
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def add_tokenizer(writer: Any, template: str | None = None) -> None:
    """Printable ASCII, and one merge."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())[: TOKENS - 3]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*letters, "he", "<|end|>", "<|pad|>"])
    writer.add_token_types([1] * len(letters) + [1, 3, 3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(TOKENS - 2)
    writer.add_pad_token_id(TOKENS - 1)
    if template is not None:
        writer.add_chat_template(template)


def write_gguf(
    path: Path,
    architecture: str = "qwen3moe",
    *,
    seed: int = 0,
    experts: Kind = Kind.F32,
    dense: Kind = Kind.F32,
    kinds: Mapping[str, Kind] | None = None,
    parts: int = 0,
    **changes: Any,
) -> Any:
    """Writes a file, or `parts` parts; returns a model with the numbers that the file stands for.

    `kinds`: types of some tensors by a part of their names.
    """
    model = make_model(architecture, seed, **changes)
    pick = kind_of_name(experts, dense)
    tensors = tensors_of(model, architecture)
    split = {"split_max_tensors": -(-len(tensors) // parts)} if parts else {}
    writer = gguf.GGUFWriter(path, architecture, **split)
    add_keys(writer, model.config)
    add_tokenizer(writer)
    for name, view in tensors.items():
        kind = next((k for part, k in (kinds or {}).items() if part in name), pick(name))
        written = as_written(name, view, model.config).contiguous()
        raw, numbers = stored(written.numpy(), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        if kind != Kind.F32:
            assert torch.equal(written, view), f"{name}: expected F32"
            view.copy_(numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model

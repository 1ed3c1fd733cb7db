"""Writes a Qwen3-MoE checkpoint as a bf16 GGUF file for llama.cpp: the same weights.

The file has no vocabulary: whoever reads it gives token ids. Matrices may be of packed types
instead, with random codes: gguf-py cannot quantise to the types of Q4_K_M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig

from benchmarks.packed_weights import fill_like_weights
from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.formats import FORMATS

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
# What Q4_K_M has outside the experts, by the last name of a matrix.
Q4_K_M = dict.fromkeys(("attn_q", "attn_k", "attn_output", "token_embd"), "q4_k")
Q4_K_M |= dict.fromkeys(("attn_v", "output"), "q6_k")
Source = tuple[str, list[int], bool, Callable[[], torch.Tensor]]  # name, shape, is f32, bytes


def export(folder: Path, path: Path, types: Mapping[str, str] | None = None) -> None:
    """Writes `path` unless it is there, with random codes for matrices that have other `types`, by
    their last names. Holds one tensor at a time."""
    if path.exists():
        return
    config = AutoConfig.from_pretrained(folder)
    if not config.norm_topk_prob:
        raise ValueError(f"{folder}: llama.cpp makes the weights of a token's experts sum to 1")
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "qwen3moe")
    _add_keys(writer, config)
    sources = list(_sources(Checkpoint.open(folder), config))
    packed = {name: kind for name, *_ in sources if (kind := (types or {}).get(_last(name)))}
    for name, shape, is_f32, _ in sources:
        if name in packed:
            kind = GGMLQuantizationType[packed[name].upper()]
            elements, size = GGML_QUANT_SIZES[kind]
            stored = [*shape[:-1], shape[-1] // elements * size]
            nbytes = int(np.prod(stored))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
            continue
        kind = GGMLQuantizationType.F32 if is_f32 else GGMLQuantizationType.BF16
        width = 4 if is_f32 else 2
        dtype = np.dtype(np.float32 if is_f32 else np.uint8)
        stored = shape if is_f32 else [*shape[:-1], 2 * shape[-1]]
        writer.add_tensor_info(name, stored, dtype, int(np.prod(shape)) * width, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, is_f32, read in sources:
        if name in packed:
            writer.write_tensor_data(_codes(packed[name], shape).numpy())
            continue
        tensor = read()
        if is_f32:
            writer.write_tensor_data(tensor.float().numpy())
        else:
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()
    part.rename(path)


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _codes(name: str, shape: list[int]) -> torch.Tensor:
    row = FORMATS[name]
    codes = torch.empty(*shape[:-1], shape[-1] // row.pack * row.unit, dtype=torch.uint8)
    fill_like_weights("", row, codes)
    return codes


def _add_keys(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _sources(checkpoint: Any, config: Any) -> Iterator[Source]:
    tensors = checkpoint.tensors

    def one(name: str, source: str, *, is_f32: bool = False) -> Source:
        entry = tensors[source]
        return name, list(entry.shape), is_f32, lambda: read_tensor(entry)

    def stacked(name: str, entries: list[Any]) -> Source:
        shape = [len(entries), *entries[0].shape]
        return name, shape, False, lambda: torch.stack([read_tensor(entry) for entry in entries])

    yield one("token_embd.weight", "model.embed_tokens.weight")
    yield one("output_norm.weight", "model.norm.weight", is_f32=True)
    if not config.tie_word_embeddings:
        yield one("output.weight", "lm_head.weight")
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}", f"blk.{layer}"
        yield one(f"{there}.attn_norm.weight", f"{here}.input_layernorm.weight", is_f32=True)
        yield one(
            f"{there}.ffn_norm.weight", f"{here}.post_attention_layernorm.weight", is_f32=True
        )
        for theirs, ours in ATTENTION.items():
            yield one(f"{there}.{ours}.weight", f"{here}.self_attn.{theirs}.weight")
        for norm in ("q_norm", "k_norm"):
            source = f"{here}.self_attn.{norm}.weight"
            yield one(f"{there}.attn_{norm}.weight", source, is_f32=True)
        yield one(f"{there}.ffn_gate_inp.weight", f"{here}.mlp.gate.weight", is_f32=True)
        for matrix in ("gate", "up", "down"):
            names = [
                f"{here}.mlp.experts.{expert}.{matrix}_proj.weight"
                for expert in range(config.num_experts)
            ]
            yield stacked(f"{there}.ffn_{matrix}_exps.weight", [tensors[name] for name in names])

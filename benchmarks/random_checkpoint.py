"""A random-weight checkpoint with the geometry of a real model, written shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from moeinf import _core

IN_RAM = Path("/dev/shm")


@dataclass(frozen=True)
class Geometry:
    """A Qwen3-MoE shape. The defaults are one layer's shape of Qwen3-30B-A3B, and 5 of its 48
    layers (6 GB of experts); the vocabulary is cut in the same proportion, so that the output
    projection takes the share of a token's time that it has in the full model."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    layers: int = 5
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 15_872

    @property
    def expert_bytes(self) -> int:
        """Of all experts, in bf16."""
        return self.layers * self.experts * 3 * self.hidden * self.intermediate * 2

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "eos_token_id": None,
        }


def folder_for(geometry: Geometry) -> Path | None:
    """Where a checkpoint of which no reads are timed is written soonest: in RAM, where there is
    room for it twice, for its experts will be pinned there too; else None, the usual place."""
    room = 5 * geometry.expert_bytes // 4
    if not IN_RAM.is_dir() or shutil.disk_usage(IN_RAM).free < room:
        return None
    return IN_RAM if _core.available_memory() > 3 * room else None


class _Noise:
    """Random bf16 tensors, cut from one buffer at random places: quick to make, no two alike.

    They lie in memory that is used again after `forget`, for touching new memory takes longer than
    writing the file.
    """

    def __init__(self, seed: int, std: float, room: int):
        self.room = torch.empty(room, dtype=torch.bfloat16)
        self.used = 0
        self.generator = torch.Generator().manual_seed(seed)
        size = 64 * 2**20
        self.buffer = torch.randn(size, generator=self.generator).mul_(std).to(torch.bfloat16)

    def __call__(self, *shape: int) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        if self.used + count > self.room.numel():
            place = torch.empty(count, dtype=torch.bfloat16)
        else:
            place = self.room[self.used : self.used + count]
            self.used += count
        for piece in place.split(self.buffer.numel() // 2):
            last = self.buffer.numel() - piece.numel()
            start = int(torch.randint(0, last, (1,), generator=self.generator))
            piece.copy_(self.buffer[start : start + piece.numel()])
        return place.view(shape)

    def forget(self) -> None:
        """The tensors given out so far are needed no longer."""
        self.used = 0


def write_random_checkpoint(folder: Path, geometry: Geometry, *, seed: int = 0) -> None:
    """Writes the folder unless it already holds this geometry; leaves nothing in the page cache."""
    config = geometry.config()
    done = folder / "config.json"
    if done.exists() and json.loads(done.read_text()) == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    g = geometry
    noise = _Noise(seed, std=0.02, room=3 * g.experts * g.hidden * g.intermediate)
    weight_map: dict[str, str] = {}
    for layer in (None, *range(g.layers)):
        name = "model-dense.safetensors" if layer is None else f"model-layer-{layer}.safetensors"
        tensors = _dense(g, noise) if layer is None else _experts(g, layer, noise)
        save_file(tensors, folder / name)
        noise.forget()
        weight_map |= dict.fromkeys(tensors, name)
        _drop_from_page_cache(folder / name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    done.write_text(json.dumps(config))


def _dense(g: Geometry, noise: _Noise) -> dict[str, torch.Tensor]:
    ones = torch.ones(g.hidden, dtype=torch.bfloat16)
    tensors = {
        # Large next to what attention adds, so that routing depends on the token.
        "model.embed_tokens.weight": noise(g.vocabulary, g.hidden) * 50,
        "lm_head.weight": noise(g.vocabulary, g.hidden),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(g.layers):
        prefix = f"model.layers.{layer}"
        head_norm = torch.ones(g.head_dim, dtype=torch.bfloat16)
        tensors |= {
            f"{prefix}.input_layernorm.weight": ones.clone(),
            f"{prefix}.post_attention_layernorm.weight": ones.clone(),
            f"{prefix}.self_attn.q_norm.weight": head_norm,
            f"{prefix}.self_attn.k_norm.weight": head_norm.clone(),
            f"{prefix}.self_attn.q_proj.weight": noise(g.heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.k_proj.weight": noise(g.kv_heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.v_proj.weight": noise(g.kv_heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.o_proj.weight": noise(g.hidden, g.heads * g.head_dim),
            f"{prefix}.mlp.gate.weight": noise(g.experts, g.hidden),
        }
    return tensors


def _experts(g: Geometry, layer: int, noise: _Noise) -> dict[str, torch.Tensor]:
    shapes = {
        "gate_proj": (g.intermediate, g.hidden),
        "up_proj": (g.intermediate, g.hidden),
        "down_proj": (g.hidden, g.intermediate),
    }
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": noise(*shape)
        for expert in range(g.experts)
        for part, shape in shapes.items()
    }


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

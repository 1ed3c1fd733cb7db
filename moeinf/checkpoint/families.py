"""How checkpoints name the tensors of their experts: one row per convention.

A row's pattern finds the layer (and the expert, where each has tensors of its own) in a name and
says which part of the expert the tensor is. Supporting another convention means adding a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError


@dataclass(frozen=True)
class Convention:
    """`parts` maps the checkpoint's word for a tensor to ours: gate, up, down or gate_up."""

    name: str
    pattern: re.Pattern[str]
    parts: dict[str, str]

    @property
    def fused(self) -> bool:
        """True if one tensor holds a part of all experts of a layer, [experts, rows, columns]."""
        return "expert" not in self.pattern.groupindex


CONVENTIONS = (
    Convention(  # Qwen2-MoE, Qwen3-MoE, DeepSeek-V2/V3, OLMoE, GLM-4-MoE and most others
        "per-expert gate_proj, up_proj, down_proj",
        re.compile(
            r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)"
            r"\.(?P<part>gate_proj|up_proj|down_proj)\.weight$"
        ),
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    ),
    Convention(  # Mixtral, Phi-3.5-MoE, MiniMax
        "per-expert w1, w3, w2",
        re.compile(
            r"^(?:.*\.)?layers\.(?P<layer>\d+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)"
            r"\.(?P<part>w1|w2|w3)\.weight$"
        ),
        {"w1": "gate", "w3": "up", "w2": "down"},
    ),
    Convention(  # what transformers >= 5 holds in memory, and some families save
        "fused gate_up_proj, down_proj",
        re.compile(
            r"^(?:.*\.)?layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts"
            r"\.(?P<part>gate_up_proj|down_proj)$"
        ),
        {"gate_up_proj": "gate_up", "down_proj": "down"},
    ),
)


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors of all experts, found by one convention.

    `tensors[layer][expert][part]` for per-expert names, `tensors[layer][0][part]` for fused ones;
    layers are numbered as in the checkpoint.
    """

    convention: Convention
    tensors: dict[int, dict[int, dict[str, TensorEntry]]]


def find_experts(tensors: dict[str, TensorEntry], *, num_layers: int) -> ExpertTensors | None:
    """Groups the tensors of experts in the first `num_layers` layers; None if there are none.

    Layers beyond `num_layers` (the multi-token prediction blocks of DeepSeek-V3) are left out.

    Raises:
        CheckpointError: two conventions, or two tensors for the same part.
    """
    found: dict[str, ExpertTensors] = {}
    for entry in tensors.values():
        for convention in CONVENTIONS:
            match = convention.pattern.match(entry.name)
            if match is None:
                continue
            layer = int(match["layer"])
            if layer >= num_layers:
                continue
            expert = 0 if convention.fused else int(match["expert"])
            group = found.setdefault(convention.name, ExpertTensors(convention, {}))
            parts = group.tensors.setdefault(layer, {}).setdefault(expert, {})
            part = convention.parts[match["part"]]
            if part in parts:
                raise CheckpointError(
                    f"{entry.path}: {entry.name!r} and {parts[part].name!r} are both the {part} "
                    f"of expert {expert} in layer {layer}"
                )
            parts[part] = entry
    if len(found) > 1:
        raise CheckpointError(f"experts are named in two ways: {' and '.join(sorted(found))}")
    return next(iter(found.values()), None)


def is_expert_tensor(name: str) -> bool:
    """True for a tensor that belongs to a routed expert."""
    return any(convention.pattern.match(name) for convention in CONVENTIONS)

"""Families of checkpoints: how they name the tensors of experts, and what their experts compute.

`parse` splits a name into the experts' module, the expert, the matrix and the piece of it. A naming
is one row of NAMINGS. The weight formats say which suffix means which piece. What an expert
computes is one row of FAMILIES, for families whose experts are not act(gate) * up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moeinf.checkpoint.config import Config, activation, positive_number
from moeinf.checkpoint.formats import BIAS_SUFFIXES, FORMATS
from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError
from moeinf.kernels.forms import ExpertForm, Gate

SUFFIXES = {s: p for f in FORMATS.values() for s, p in f.suffixes.items()} | BIAS_SUFFIXES


@dataclass(frozen=True)
class Naming:
    """`matrices` maps the checkpoint's word for a tensor to gate, up, down or gate_up.

    `fused`: one tensor holds a matrix of all experts of a layer, [experts, rows, columns].
    `interleaved`: the rows of gate and up alternate in the tensors called gate_up.
    """

    name: str
    blocks: str
    matrices: dict[str, str]
    fused: bool = False
    interleaved: bool = False

    def pattern(self) -> re.Pattern[str]:
        expert = "" if self.fused else r"\.(?P<expert>\d+)"
        return re.compile(
            r"(?P<module>(?:(?P<model>.+?)\.)?layers\.(?P<layer>\d+)\."
            rf"(?:{self.blocks})\.experts){expert}"
            rf"\.(?P<word>{'|'.join(self.matrices)})(?P<suffix>|[._].+)"
        )


NAMINGS = (
    Naming(  # Qwen2-MoE, Qwen3-MoE, DeepSeek-V2/V3, OLMoE, GLM-4-MoE and most others
        "per-expert gate_proj, up_proj, down_proj",
        "mlp|block_sparse_moe|feed_forward",
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    ),
    Naming(  # Mixtral, Phi-3.5-MoE, MiniMax; DeepSeek-V4 says ffn
        "per-expert w1, w3, w2",
        "block_sparse_moe|mlp|feed_forward|ffn",
        {"w1": "gate", "w3": "up", "w2": "down"},
    ),
    Naming(  # what transformers >= 5 holds in memory, and some families save
        "fused gate_up_proj, down_proj",
        "mlp|block_sparse_moe|feed_forward",
        {"gate_up_proj": "gate_up", "down_proj": "down"},
        fused=True,
    ),
    Naming(  # Inkling
        "fused w13_weight, w2_weight",
        "mlp",
        {"w13_weight": "gate_up", "w2_weight": "down"},
        fused=True,
        interleaved=True,
    ),
)
_PATTERNS = tuple((naming, naming.pattern()) for naming in NAMINGS)

# Paths of the language model's layers. Experts elsewhere belong to a vision tower, to a talker or
# to a block that predicts several tokens ("mtp.layers.0"): their layer numbers mean other layers.
TEXT_MODELS = frozenset(
    {"", "model", "model.language_model", "language_model.model", "language_model", "model.llm"}
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor of experts belongs.

    module  whole path of the module of a layer's experts: model.layers.3.mlp.experts
    model   the part of it before "layers"
    layer   number of the layer in that model
    expert  None for a tensor of all experts
    matrix  gate, up, down or gate_up
    piece   values, scales or bias, or None for a suffix of no known weight format
    """

    naming: Naming
    module: str
    model: str
    layer: int
    expert: int | None
    matrix: str
    piece: str | None


def parse(name: str) -> Address | None:
    """None for a tensor that belongs to no routed expert."""
    if ".experts." not in name:  # most others: the patterns need not be tried
        return None
    for naming, pattern in _PATTERNS:
        match = pattern.fullmatch(name)
        if match is not None:
            return Address(
                naming,
                module=match["module"],
                model=match["model"] or "",
                layer=int(match["layer"]),
                expert=None if naming.fused else int(match["expert"]),
                matrix=naming.matrices[match["word"]],
                piece=SUFFIXES.get(match["suffix"]),
            )
    return None


def find_experts(
    tensors: Iterable[TensorEntry], num_layers: int
) -> list[tuple[Address, TensorEntry]]:
    """The tensors of experts in the first `num_layers` layers of the language model.

    Those of other models in the same files and of layers beyond `num_layers` (the multi-token
    prediction blocks of DeepSeek-V3) are left out.

    Raises:
        CheckpointError: experts are named in two ways or lie in two language models, or a tensor of
            an expert is none of the pieces that a weight format has.
    """
    found: list[tuple[Address, TensorEntry]] = []
    for entry in tensors:
        address = parse(entry.name)
        if address is None or address.model not in TEXT_MODELS or address.layer >= num_layers:
            continue
        if address.piece is None:
            raise CheckpointError(
                f"{entry}: a tensor of an expert, expected a name that ends in one of "
                f"{', '.join(sorted(filter(None, SUFFIXES)))}"
            )
        first, first_entry = found[0] if found else (address, entry)
        if (address.naming, address.model) != (first.naming, first.model):
            raise CheckpointError(
                f"{entry.path}: experts are named in two ways: {first_entry.name!r} is "
                f"{first.naming.name}, {entry.name!r} is {address.naming.name}"
            )
        found.append((address, entry))
    return found


@dataclass(frozen=True)
class Family:
    """`form` reads what an expert computes from config.json; the defaults are transformers'.

    Of fused tensors: `transposed`, they are stored as [experts, inputs, outputs]; `interleaved`,
    gate and up alternate in them.
    """

    form: Callable[[Config, Path], ExpertForm]
    transposed: bool = False
    interleaved: bool = False


def _swiglu_oai(config: Config, file: Path) -> Gate:
    alpha = positive_number(config, "swiglu_alpha", 1.702, file)
    return Gate("swiglu_oai", alpha=alpha, limit=positive_number(config, "swiglu_limit", 7.0, file))


def _clamped_glu(config: Config, file: Path) -> ExpertForm:
    limit = positive_number(config, "swiglu_limit", 10.0, file)
    return ExpertForm(Gate("clamped_glu", activation(config, file), limit=limit))


def _softcap_swiglu(config: Config, file: Path) -> ExpertForm:
    alpha = positive_number(config, "mlp_gate_softcap", 4.0, file)
    limit = positive_number(config, "mlp_up_softcap", 25.0, file)
    return ExpertForm(Gate("softcap_swiglu", alpha=alpha, limit=limit))


# By model_type. Every other family has act(gate) * up without biases.
FAMILIES = {
    "deepseek_v4": Family(_clamped_glu),
    "glm5_next_text": Family(_clamped_glu),
    "gpt_oss": Family(
        lambda c, f: ExpertForm(_swiglu_oai(c, f), has_bias=True), transposed=True, interleaved=True
    ),
    "hy_v4": Family(_clamped_glu),
    "inkling2_text": Family(_softcap_swiglu),
    "minimax_m3_vl_text": Family(lambda c, f: ExpertForm(_swiglu_oai(c, f))),
}
# A family that sets one of these and has no row above computes something that is not known here.
GATE_KEYS = ("swiglu_limit", "swiglu_limits", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap")


def family_of(config: Config, file: Path) -> Family:
    """The row of the model's family.

    Raises:
        CheckpointError: the configuration has constants of a gate and the family has no row.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    for key in GATE_KEYS:
        if config.get(key) is not None:
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}, which no family {model_type!r} is known to "
                f"use; expected one of {', '.join(FAMILIES)}"
            )
    return Family(lambda config, file: ExpertForm(Gate(activation=activation(config, file))))

"""`moeinf info`: the experts of a checkpoint, and the share of them that fits into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeinf import _core
from moeinf.checkpoint.store import ExpertStore
from moeinf.cli.output import human_bytes, print_facts, print_json
from moeinf.pocket import POCKET


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint folder; the built-in model without it.", show_default=False
        ),
    ] = POCKET,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the experts of a checkpoint, their sizes and layout."""
    facts = describe(ExpertStore.open(checkpoint))
    if json:
        print_json(facts)
        return
    segments = ", ".join(
        f"{segment['name']} {segment['dtype']} {segment['shape']}" for segment in facts["segments"]
    )
    print_facts(
        str(checkpoint),
        {
            "architecture": facts["model_type"],
            "MoE layers": str(facts["num_layers"]),
            "experts per layer": f"{facts['num_experts']}, {facts['top_k']} per token",
            "expert": f"{human_bytes(facts['expert_bytes'])}: {segments}; {facts['activation']}",
            "slot": human_bytes(facts["slot_bytes"]),
            "all experts": human_bytes(facts["all_experts_bytes"]),
            "other weights": human_bytes(facts["other_bytes"]),
            "one token reads": human_bytes(facts["token_bytes"]),
            "one token's working set": f"{facts['working_set']} experts "
            f"({facts['working_set_share']:.1%} of all)",
            "memory available": human_bytes(facts["available_bytes"]),
            "experts that fit here": f"{facts['fits_share']:.1%}",
        },
    )


def describe(store: ExpertStore) -> dict[str, Any]:
    """The facts as plain values; bytes are counted without units."""
    total = store.num_layers * store.num_experts
    expert_names = store.tensor_names()
    other = sum(
        entry.nbytes for name, entry in store.checkpoint.tensors.items() if name not in expert_names
    )
    available = _core.available_memory()
    working_set = store.num_layers * (store.top_k or store.num_experts)
    return {
        "path": str(store.checkpoint.path),
        "model_type": store.checkpoint.config.get("model_type", "unknown"),
        "num_layers": store.num_layers,
        "num_experts": store.num_experts,
        "top_k": store.top_k,
        "activation": store.form.gate.activation,
        "segments": [
            {
                "name": segment.name,
                "dtype": str(segment.dtype)[6:],
                "shape": list(segment.shape),
                "offset": segment.offset,
            }
            for segment in store.layout.segments
        ],
        "expert_bytes": store.layout.nbytes,
        "slot_bytes": store.slot_bytes,
        "all_experts_bytes": store.nbytes,
        "other_bytes": other,
        "token_bytes": working_set * store.layout.nbytes,
        "working_set": working_set,
        "working_set_share": working_set / total,
        "available_bytes": available,
        "fits_share": min(1.0, max(0.0, (available - other) / (total * store.slot_bytes))),
    }

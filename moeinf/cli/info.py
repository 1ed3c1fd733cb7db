"""`moeinf info`: the experts of a checkpoint, and the share of them that fits into memory."""

from __future__ import annotations

from typing import Any

from moeinf.cache.budget import RAM_RESERVE, free_bytes, less_reserve, slots_for
from moeinf.checkpoint.store import ExpertStore
from moeinf.cli import options
from moeinf.cli.output import human_bytes, print_facts, print_json
from moeinf.errors import CapacityError
from moeinf.pocket import POCKET


def command(
    checkpoint: options.Checkpoint = POCKET,
    json: options.Json = False,
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
    available = free_bytes(None)
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
        "fits_share": _fitting(store, less_reserve(available, RAM_RESERVE, other)) / total,
    }


def _fitting(store: ExpertStore, free: int) -> int:
    """The slots that a budget of "auto" has on the CPU."""
    try:
        return slots_for(
            memory="auto",
            slots=None,
            slot_bytes=store.slot_bytes,
            total_experts=store.num_layers * store.num_experts,
            free=free,
        )
    except CapacityError:
        return 0

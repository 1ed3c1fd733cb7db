"""`moeinf info`: what a checkpoint is, whether it is served, and how much of it fits here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from moeinf.cache.budget import free_bytes
from moeinf.cache.devices import open_device, pick_device
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed_entry import tensors_of
from moeinf.checkpoint.store import ExpertStore
from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import human_bytes, print_facts, print_json
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.pocket import POCKET


def command(
    checkpoint: options.Checkpoint = POCKET,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Shows a checkpoint's family, experts and sizes, from its headers alone."""
    with Checkpoint.peek(checkpoint, revision, trust_remote_code) as opened:
        facts = {"path": str(checkpoint), **describe(opened)}
    if json:
        print_json(facts)
    else:
        print_facts(facts["path"], _in_words(facts))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts as plain values; bytes are counted without units.

    `served` is what `moeinf.load` would find out before it reads a tensor; `reason` is its error.
    """
    with quiet_interrupts():
        from moeinf.integrations.transformers.caches import slots_that_fit
        from moeinf.integrations.transformers.dense import choose_dense
        from moeinf.integrations.transformers.load import computing_dtype
        from moeinf.integrations.transformers.models import model_of
        from moeinf.integrations.transformers.plan import make_plan
    stored: Counter[str] = Counter()
    for entry in [*checkpoint.tensors.values(), *checkpoint.unread]:
        stored[entry.dtype] += _stored_bytes([entry])
    facts: dict[str, Any] = {
        "model_type": checkpoint.config.get("model_type", "unknown"),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(stored.values()),
        "bytes_by_dtype": dict(stored.most_common()),
    }
    try:
        base, config = model_of(checkpoint)
        plan = make_plan(base, config, checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        return {**facts, "served": False, "reason": str(error)}
    stores, device = plan.stores, pick_device("auto")
    total = sum(store.num_layers * store.num_experts for store in stores)
    served = {name for store in stores for name in store.tensor_names()}
    experts = _stored_bytes(checkpoint.tensors[name] for name in served)
    dense = _stored_bytes({entry.name: entry for entry in plan.dense.values()}.values())
    weights = choose_dense(plan, device)
    loaded = weights.bytes_loaded_as(computing_dtype("auto", config, stores[0]))
    kinds = [_of_store(store) for store in stores]
    working_set = sum(kind["working_set"] for kind in kinds)
    return {
        **facts,
        "served": True,
        "class": base.__name__,
        **kinds[0],
        **({"other_experts": kinds[1:]} if kinds[1:] else {}),
        "all_experts_bytes": experts,
        "other_bytes": dense,
        "unused_bytes": facts["bytes"] - experts - dense,
        "token_bytes": sum(kind["working_set"] * kind["expert_bytes"] for kind in kinds),
        "working_set": working_set,
        "working_set_share": working_set / total,
        "device": str(device),
        "available_bytes": free_bytes(open_device(device)),
        "fits_share": sum(slots_that_fit(stores, device, loaded)) / total,
    }


def _stored_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes in the files."""
    return sum(one.nbytes for entry in entries for one in tensors_of(entry))


def _of_store(store: ExpertStore) -> dict[str, Any]:
    gate, top_k = store.form.gate, store.top_k or store.num_experts
    return {
        "num_layers": store.num_layers,
        "num_experts": store.num_experts,
        "top_k": top_k,
        "gate": gate.function,
        "activation": gate.activation,
        "has_gate": store.form.has_gate,
        "has_bias": store.form.has_bias,
        "format": store.layout.format_names,
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
        "working_set": store.num_layers * top_k,
    }


def _in_words(facts: dict[str, Any]) -> dict[str, str]:
    parts = (f"{human_bytes(size)} {dtype}" for dtype, size in facts["bytes_by_dtype"].items())
    rows = {
        "family": facts["model_type"],
        "weights": f"{human_bytes(facts['bytes'])} in {facts['tensors']} tensors: "
        + ", ".join(parts),
    }
    if not facts["served"]:
        return {**rows, "served": f"no: {facts['reason']}"}
    rows["served"] = f"yes, as {facts['class']}"
    for number, kind in enumerate((facts, *facts.get("other_experts", ())), 1):
        of = "" if number == 1 else f", kind {number}"
        parts = (f"{one['name']} {one['dtype']} {one['shape']}" for one in kind["segments"])
        form = [kind["gate"]] * kind["has_gate"] + [kind["activation"]]
        rows |= {
            f"MoE layers{of}": str(kind["num_layers"]),
            f"experts per layer{of}": f"{kind['num_experts']}, {kind['top_k']} per token",
            f"expert{of}": f"{human_bytes(kind['expert_bytes'])}: {', '.join(parts)}",
            f"format{of}": kind["format"],
            f"form{of}": ", ".join(form + ["biases"] * kind["has_bias"]),
            f"slot{of}": human_bytes(kind["slot_bytes"]),
        }
    return {
        **rows,
        "all experts": human_bytes(facts["all_experts_bytes"]),
        "other weights": human_bytes(facts["other_bytes"]),
        **({"not used": human_bytes(facts["unused_bytes"])} if facts["unused_bytes"] else {}),
        "one token reads": human_bytes(facts["token_bytes"]),
        "one token's working set": f"{facts['working_set']} experts "
        f"({facts['working_set_share']:.1%} of all)",
        "memory available": human_bytes(facts["available_bytes"]),
        "experts that fit here": f"{facts['fits_share']:.1%}, on {facts['device']}",
    }

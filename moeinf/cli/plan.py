"""`moeinf plan`: how fast a checkpoint will run here, by budget and format, and what to choose."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moeinf.cache.budget import RAM_RESERVE, free_bytes, less_reserve, parse_bytes, slots_for
from moeinf.checkpoint.folder import Checkpoint
from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import console, human_bytes, print_facts, print_json, print_table
from moeinf.errors import CapacityError
from moeinf.planning.estimate import Advice, Estimate, advise, best_policy, check_trace, estimate
from moeinf.pocket import POCKET
from moeinf.traces.trace import Trace

SHARES = ("10%", "25%", "50%", "100%")


@dataclass(frozen=True)
class Budget:
    """Bytes of slots. `fits` is whether they are free here beside the rest of the model."""

    memory: str
    bytes: int
    fits: bool
    estimates: list[Estimate]


def command(
    checkpoint: options.Checkpoint = POCKET,
    revision: options.Revision = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing of this model, from --record; a curve of others without it."),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Budgets, comma-separated: 2GiB, a share of all experts, or auto.")
    ] = ",".join(("auto", *SHARES)),
    json: options.Json = False,
) -> None:
    """Estimates tokens per second on this machine's CPU, from rates that it measures now."""
    with quiet_interrupts():
        from moeinf.planning.model import read_model
        from moeinf.planning.rates import measure
    with Checkpoint.peek(checkpoint, revision) as opened:
        if not opened.has_weights:
            raise ValueError(f"{checkpoint}: its weights are not here: the disk cannot be measured")
        costs = read_model(opened)
        loaded = None if trace is None else Trace.load(trace)
        if loaded is not None:
            check_trace(loaded, costs)
        with console(stderr=True).status("Measuring") as status:
            rates = measure(costs, told=lambda what: status.update(f"Measuring {what}"))
    free = free_bytes(None)
    layouts = costs.layouts()
    own = next(iter(layouts.values()))
    budgets = []
    for word in filter(None, map(str.strip, memory.split(","))):
        size = _bytes_of(word, own.slot_bytes, costs, free)
        rows = []
        policy = best_policy(loaded, _slots(size, own.slot_bytes, costs.total_experts))
        for name, layout in layouts.items():
            slots = _slots(size, layout.slot_bytes, costs.total_experts)
            rows.append(estimate(costs, rates, name, layout, slots, loaded, policy))
        fits = rows[0].memory_bytes + costs.loaded_bytes <= free
        budgets.append((policy, Budget(word, size, fits, rows)))
    if not budgets:
        raise ValueError(f"--memory: expected at least one budget, found {memory!r}")
    fitting = [one for one in budgets if one[1].fits] or budgets
    policy, largest = max(fitting, key=lambda one: one[1].bytes)
    advice = advise(largest.estimates, largest.bytes, policy)
    facts = {
        "path": str(checkpoint),
        "device": "cpu",
        "trace": None if loaded is None else loaded.name,
        "rates": asdict(rates),
        "layers": costs.layers,
        "dense_bytes_per_token": costs.dense_bytes,
        "expert_bytes_per_token": {
            name: sum(store.num_layers for store in costs.stores) * costs.top_k * layout.nbytes
            for name, layout in layouts.items()
        },
        "other_bytes": costs.loaded_bytes,
        "available_bytes": free,
        "budgets": [asdict(one) for _, one in budgets],
        "advice": asdict(advice),
    }
    if json:
        print_json(facts)
    else:
        _print(facts, [one for _, one in budgets], advice)


def _bytes_of(word: str, slot_bytes: int, costs: Any, free: int) -> int:
    """What slots may take; a share is one of all experts in the checkpoint's own format."""
    every = costs.total_experts * slot_bytes
    if word == "auto":
        return int(min(every, less_reserve(free, RAM_RESERVE, costs.loaded_bytes)))
    if word.endswith("%"):
        count = slots_for(
            memory=word, slots=None, slot_bytes=slot_bytes, total_experts=costs.total_experts
        )
        return count * slot_bytes
    return parse_bytes(word)


def _slots(size: int, slot_bytes: int, total: int) -> int:
    if size < slot_bytes:
        raise CapacityError(f"--memory: {size:,} bytes are below one slot of {slot_bytes:,} bytes")
    return min(size // slot_bytes, total)


def _print(facts: dict[str, Any], budgets: list[Budget], advice: Advice) -> None:
    rates = facts["rates"]
    experts = ", ".join(
        f"{human_bytes(size)} {name}" for name, size in facts["expert_bytes_per_token"].items()
    )
    print_facts(
        facts["path"],
        {
            "measured now": f"memory {rates['memory'] / 1e9:.1f} GB/s, experts from the disk "
            f"{rates['disk'] / 1e9:.2f} GB/s, linear layers {rates['dense'] / 1e9:.1f} GB/s, "
            f"a layer {rates['layer_seconds'] * 1e3:.2f} ms",
            "one token reads": f"{human_bytes(facts['dense_bytes_per_token'])} of other weights, "
            f"and experts: {experts}",
            "other weights take": human_bytes(facts["other_bytes"]),
            "memory available": human_bytes(facts["available_bytes"]),
            "hits": f"from the trace {facts['trace']}"
            if facts["trace"]
            else "from a curve of four models; the range is that of their curves",
        },
    )
    print_table(
        "tokens/s on the CPU (hit rate), by the memory of the slots",
        ["memory", *(one.format for one in budgets[0].estimates)],
        [
            [
                f"{one.memory}: {human_bytes(one.bytes)}{'' if one.fits else ', does not fit'}",
                *map(_cell, one.estimates),
            ]
            for one in budgets
        ],
    )
    print(
        f"Run it with --memory {human_bytes(advice.memory_bytes).replace(' ', '')} --policy "
        f"{advice.policy}: about {advice.tokens_per_second:.3g} tokens/s."
    )
    if advice.pack_format is not None:
        assert advice.pack_tokens_per_second is not None
        print(
            f"moeinf pack --format {advice.pack_format} makes it about "
            f"{advice.pack_tokens_per_second:.3g} tokens/s, and changes what the model computes."
        )


def _cell(one: Estimate) -> str:
    text = f"{one.tokens_per_second:.3g}"
    if one.low is not None and one.high is not None and one.share < 1:
        text += f" [{one.low:.3g} to {one.high:.3g}]"
    return f"{text} ({one.hit_rate:.0%})"

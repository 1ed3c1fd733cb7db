"""Tokens per second of a model whose experts do not fit, against transformers' disk offload.

    python -m benchmarks.end_to_end --json benchmarks/results/end_to_end.json

One checkpoint with random weights and the geometry of Qwen3-30B-A3B. Each system runs in its own
process: moeinf with a quarter of the experts, transformers with accelerate's disk offload under the
same memory limit, and moeinf with every expert resident. The limit is the size of the weights that
are not experts, the budget, 10% of both, and the memory of an interpreter with torch. A memory
cgroup enforces it where one can be made, and the page cache counts too.

A cache gains from experts that repeat. Tokens are sampled from a random model, so experts repeat
less than in real text, and the hit rate is lower than with a real model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint

PROMPT_TOKENS = 16
INTERPRETER_BYTES = 1200 * 2**20  # python with torch and transformers, its threads and buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="about 13 GB")
    parser.add_argument("--memory", default="25%", help="budget of experts")
    parser.add_argument("--policy", default="learned")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens with moeinf")
    parser.add_argument("--offload-tokens", type=int, default=4, help="with disk offload")
    parser.add_argument("--layers", type=int, default=Geometry.layers)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.dir / f"qwen3-30b-a3b-{arguments.layers}-layers"
    if arguments.child:
        print(json.dumps(SYSTEMS[arguments.child](folder, arguments)))
        return
    write_random_checkpoint(folder, Geometry(layers=arguments.layers))
    rows = run_all(folder, arguments)
    print_table(
        [
            {
                **row,
                "limit_gb": row["limit_bytes"] and row["limit_bytes"] / 1e9,
                "peak_gb": row["peak_bytes"] / 1e9,
            }
            for row in rows
        ],
        {
            "system": ("system", ""),
            "tokens_per_second": ("tokens/s", ".3f"),
            "first_token_seconds": ("s to first token", ".2f"),
            "hit_rate": ("hit rate", ".1%"),
            "limit_gb": ("limit GB", ".2f"),
            "peak_gb": ("peak GB", ".2f"),
        },
    )
    rates = {row["system"]: row["tokens_per_second"] for row in rows}
    offload = rates["transformers, accelerate disk offload"]
    ratios = {name: rate / offload for name, rate in rates.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f}x accelerate's disk offload")
    if arguments.json:
        write_json(
            arguments.json,
            "end_to_end",
            memory=arguments.memory,
            policy=arguments.policy,
            layers=arguments.layers,
            rows=rows,
            ratios_to_disk_offload=ratios,
        )


def run_all(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from moeinf.cache.budget import slots_for
    from moeinf.checkpoint.store import ExpertStore

    store = ExpertStore.open(folder)
    dense = sum(entry.nbytes for entry in store.checkpoint.tensors.values()) - store.nbytes
    slots = slots_for(
        memory=arguments.memory,
        slots=None,
        slot_bytes=store.slot_bytes,
        total_experts=store.num_layers * store.num_experts,
    )
    limit = int(1.1 * (dense + slots * store.slot_bytes)) + INTERPRETER_BYTES
    rows = []
    for system in SYSTEMS:
        bounded = None if system == "moeinf, all resident" else limit
        with memory_cgroup(limit) if bounded else nullcontext() as join:
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.end_to_end", "--child", system,
                 "--dir", str(arguments.dir), "--memory", arguments.memory,
                 "--policy", arguments.policy, "--tokens", str(arguments.tokens),
                 "--offload-tokens", str(arguments.offload_tokens),
                 "--layers", str(arguments.layers), "--limit", str(limit)],
                stdout=subprocess.PIPE, text=True, check=True, preexec_fn=join,
            )  # fmt: skip
        row = json.loads(child.stdout.splitlines()[-1])
        enforced = join is not None
        rows.append({"system": system, "limit_bytes": bounded, "limit_enforced": enforced, **row})
        print(f"{system}: {row['tokens_per_second']:.3f} tokens/s", file=sys.stderr)
    return rows


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Callable[[], None] | None]:
    """What a child calls to live under `limit` bytes; None where no cgroup can be made."""
    for root, control in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / "moeinf-bench"
        try:
            group.mkdir(exist_ok=True)
            (group / control).write_text(str(limit))
        except OSError:
            continue
        try:
            yield partial(_join, group)
        finally:
            time.sleep(0.5)  # a child that has just ended still counts for a moment
            group.rmdir()
        return
    print("no memory cgroup can be made here: the limit is not enforced", file=sys.stderr)
    yield None


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")


def run_moeinf(folder: Path, arguments: argparse.Namespace, memory: str) -> dict[str, Any]:
    import moeinf

    model = moeinf.load(folder, memory=memory, policy=arguments.policy)
    if memory == "100%":  # bring every expert in first: this run is about computing
        cache = model.moeinf.cache
        for layer in range(cache.store.num_layers):
            for lease in cache.waves(layer, list(range(cache.store.num_experts))):
                lease.release()
    model.moeinf.reset_stats()
    report = measure(model, arguments.tokens)
    stats = model.moeinf.stats()
    return {
        **report,
        **{k: stats[k] for k in ("hit_rate", "demand_bytes", "stall_seconds", "slots")},
    }


def run_disk_offload(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from moeinf.checkpoint.store import ExpertStore

    store = ExpertStore.open(folder)
    # What stays in memory may take the limit less the interpreter and the layer being computed.
    layer = store.num_experts * store.layout.nbytes
    room = arguments.limit - INTERPRETER_BYTES - layer
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": max(room, 1)},
        offload_folder=arguments.dir / "offload",
        dtype="bfloat16",
    )
    on_disk = sum(place == "disk" for place in model.hf_device_map.values())
    return {**measure(model, arguments.offload_tokens), "modules_on_disk": on_disk}


def measure(model: Any, tokens: int) -> dict[str, Any]:
    """Sampled decoding of one prompt; tokens/s counts those after the first."""
    import torch

    from moeinf.integrations.transformers.generation import peak_memory

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    times = [time.perf_counter()]

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.manual_seed(0)
    with torch.inference_mode():
        model.generate(
            prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            streamer=Clock(),
            pad_token_id=0,
        )
    first, last = times[2], times[-1]  # times[1] is the prompt itself
    return {
        "first_token_seconds": first - times[0],
        "tokens_per_second": (len(times) - 3) / (last - first),
        "peak_bytes": peak_memory(),
    }


SYSTEMS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "moeinf": lambda folder, a: run_moeinf(folder, a, a.memory),
    "transformers, accelerate disk offload": run_disk_offload,
    "moeinf, all resident": lambda folder, a: run_moeinf(folder, a, "100%"),
}


if __name__ == "__main__":
    main()

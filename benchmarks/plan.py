"""`moeinf plan` against measured runs: tokens/s, estimated and live.

    python -m benchmarks.plan --json benchmarks/results/plan.json

A checkpoint with random weights and the geometry of Qwen3-30B-A3B, its packs, and the built-in
model. Each decodes prompts greedily at several budgets. The routing of the first prompt is the
trace that the plan is given; the others are timed. Before each of them the machine is measured as
`moeinf plan` does it, so that other work affects both. A ratio is the estimate over the
live rate right after it; the median over rounds counts. The limit is a ratio of 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.prefetch import prompts_for
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from benchmarks.time_model import decode
from moeinf.checkpoint.folder import Checkpoint
from moeinf.planning.estimate import estimate
from moeinf.planning.model import read_model
from moeinf.planning.rates import measure
from moeinf.pocket import POCKET

PACKS = ("fp8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="7 GB by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", nargs="+", default=["10%", "25%", "50%", "100%"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = arguments.dir / f"pack-{arguments.layers}-layers"
    write_random_checkpoint(source, Geometry(layers=arguments.layers))
    folders = {"bf16": source}
    for name in PACKS:
        folders[name] = arguments.dir / f"{source.name}-{name}"
        if not (folders[name] / "config.json").exists():
            shutil.rmtree(folders[name], ignore_errors=True)
            moeinf.pack(source, folders[name], format=name)
    rows = [
        *compare("Qwen3-30B-A3B, random", folders, arguments),
        *compare("built-in", {"bf16": POCKET}, arguments),
    ]
    print_table(
        rows,
        {
            "model": ("model", ""),
            "format": ("format", ""),
            "memory": ("memory", ""),
            "hit_rate": ("hit rate", ".1%"),
            "estimated": ("estimated tokens/s", ".2f"),
            "live": ("live", ".2f"),
            "ratio": ("ratio", ".2f"),
            "ratio_low": ("lowest", ".2f"),
            "ratio_high": ("highest", ".2f"),
        },
    )
    if arguments.json:
        write_json(
            arguments.json,
            "plan",
            layers=arguments.layers,
            rounds=arguments.rounds,
            tokens=arguments.tokens,
            load_average=os.getloadavg(),
            rows=rows,
        )


def compare(
    name: str, folders: dict[str, Path], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each format and budget; `folders` has the checkpoint first, then its packs."""
    source = next(iter(folders.values()))
    costs = read_model(Checkpoint.open(source))
    layouts = costs.layouts()
    pairs: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    trace = None
    for form, folder in folders.items():
        for memory in arguments.memory:
            model: Any = moeinf.load(folder, memory=memory)  # one at a time: they fill the memory
            prompts = prompts_for(source, model.config.vocab_size, arguments.rounds + 1)
            recorder = model.moeinf.cache.record()
            decode(model, prompts[0], arguments.tokens)  # fills the slots too
            trace = trace or recorder.trace()
            model.moeinf.cache.stop_recording()
            slots = model.moeinf.cache.slots
            for prompt in prompts[1:]:
                rates = measure(costs, [form])
                guess = estimate(costs, rates, form, layouts[form], slots, trace)
                seconds, _ = decode(model, prompt, arguments.tokens)
                found = guess.tokens_per_second, 1 / seconds, guess.hit_rate
                pairs.setdefault((form, memory), []).append(found)
            del model
    rows = []
    for (form, memory), found in pairs.items():
        ratios = [guess / live for guess, live, _ in found]
        rows.append(
            {
                "model": name,
                "format": form,
                "memory": memory,
                "hit_rate": found[0][2],
                "estimated": statistics.median(guess for guess, _, _ in found),
                "live": statistics.median(live for _, live, _ in found),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows


if __name__ == "__main__":
    main()

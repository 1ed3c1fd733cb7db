"""The first 32 tokens after a model is loaded, against the next 32: every expert fits in memory.

    python -m benchmarks.first_tokens --json benchmarks/results/first_tokens.json

Random weights with the geometry of Qwen3-30B-A3B, and a few of its layers, at `memory="100%"` with
slots that are filled in the background, as `moeinf run` does. A process loads the model from a cold
page cache and at once decodes random tokens, whose experts are nearly all that there are. Another
process only fills the slots: the first tokens cannot come sooner than their experts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.peers import drop_from_page_cache
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint

HALF = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="4 GB")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    geometry = Geometry(layers=arguments.layers)
    folder = arguments.dir / f"qwen3-30b-a3b-{arguments.layers}-layers-{geometry.vocabulary}"
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](folder)))
        return
    write_random_checkpoint(folder, geometry)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        row: dict[str, Any] = {"round": number + 1}
        for child in CHILDREN:
            drop_from_page_cache(folder)
            command = [sys.executable, "-m", "benchmarks.first_tokens", "--child", child]
            command += ["--dir", str(arguments.dir), "--layers", str(arguments.layers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        row["ratio"] = row["next_seconds"] / row["first_seconds"]
        row["limit"] = row["next_seconds"] / max(row["next_seconds"], row["fill_seconds"])
        rows.append(row)
    print_table(
        rows,
        {
            "round": ("round", "d"),
            "first_seconds": (f"first {HALF} tokens, s", ".2f"),
            "next_seconds": (f"next {HALF}, s", ".2f"),
            "fill_seconds": ("filling alone, s", ".2f"),
            "ratio": ("next/first", ".2f"),
            "limit": ("the most it can be", ".2f"),
        },
    )
    if arguments.json:
        write_json(
            arguments.json,
            "first_tokens",
            layers=arguments.layers,
            load_average=os.getloadavg(),
            rows=rows,
        )


@torch.inference_mode()
def decode(folder: Path) -> dict[str, float]:
    model: Any = moeinf.load(folder, memory="100%", fill=True, device="cpu")
    ids = torch.randint(0, model.config.vocab_size, (2 * HALF, 1, 1))
    past, times = None, []
    for token in ids:
        start = time.perf_counter()
        past = model(token, past_key_values=past, use_cache=True).past_key_values
        times.append(time.perf_counter() - start)
    return {"first_seconds": sum(times[:HALF]), "next_seconds": sum(times[HALF:])}


def fill(folder: Path) -> dict[str, float]:
    cache = moeinf.load(folder, memory="100%", device="cpu").moeinf.cache
    start = time.perf_counter()
    cache.fill()
    for layer in range(cache.store.num_layers):
        for lease in cache.waves(layer, list(range(cache.store.num_experts))):
            lease.release()
    return {"fill_seconds": time.perf_counter() - start}


CHILDREN = {"decode": decode, "fill": fill}


if __name__ == "__main__":
    main()

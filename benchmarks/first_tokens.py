"""The first 32 tokens after a model is loaded, against the next 32: every expert fits in memory.

    python -m benchmarks.first_tokens --json benchmarks/results/first_tokens.json

Random weights with the geometry of Qwen3-30B-A3B, and a few of its layers, at `memory="100%"` with
slots that are filled in the background, as `moeinf run` does. Each round is a process that loads
the model from a cold page cache and at once decodes random tokens.
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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    geometry = Geometry(layers=arguments.layers)
    folder = arguments.dir / f"qwen3-30b-a3b-{arguments.layers}-layers-{geometry.vocabulary}"
    if arguments.child:
        print(json.dumps(run(folder, geometry)))
        return
    write_random_checkpoint(folder, geometry)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        drop_from_page_cache(folder)
        command = [sys.executable, "-m", "benchmarks.first_tokens", "--child"]
        command += ["--dir", str(arguments.dir), "--layers", str(arguments.layers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"round": number + 1} | json.loads(done.stdout.splitlines()[-1]))
    print_table(
        rows,
        {
            "round": ("round", "d"),
            "first": (f"tokens/s, first {HALF}", ".1f"),
            "next": (f"next {HALF}", ".1f"),
            "ratio": ("ratio", ".2f"),
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
def run(folder: Path, geometry: Geometry) -> dict[str, float]:
    model: Any = moeinf.load(folder, memory="100%", fill=True, device="cpu")
    ids = torch.randint(0, geometry.vocabulary, (2 * HALF, 1, 1))
    past, times = None, []
    for token in ids:
        start = time.perf_counter()
        past = model(token, past_key_values=past, use_cache=True).past_key_values
        times.append(time.perf_counter() - start)
    first, following = HALF / sum(times[:HALF]), HALF / sum(times[HALF:])
    return {"first": first, "next": following, "ratio": first / following}


if __name__ == "__main__":
    main()

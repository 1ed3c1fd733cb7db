"""A long prompt with a quarter of the experts in memory: how much it reads, and how long it takes.

    python -m benchmarks.long_prompt --json benchmarks/results/long_prompt.json

Random weights with the geometry of Qwen3-30B-A3B, and a few of its layers. In each round the same
prompt is computed with every expert in memory, and with a share of them; before that, every expert
is read once into the slots of the share and nothing is computed. The least time that the prompt can
take is that of reading or that of computing, whichever is longer. The share's slots are full of an
earlier text's experts when the prompt begins. The page cache holds none of the files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.peers import drop_from_page_cache, fill_all
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="4 GB")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    geometry = Geometry(layers=arguments.layers)
    folder = arguments.dir / f"qwen3-30b-a3b-{arguments.layers}-layers-{geometry.vocabulary}"
    write_random_checkpoint(folder, geometry)
    whole = moeinf.load(folder, memory="100%", device="cpu")
    fill_all(whole)
    small = moeinf.load(folder, memory=arguments.memory, device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in arguments.prompts:
        rounds = []
        for number in range(arguments.rounds + 1):
            ids = torch.randint(0, geometry.vocabulary, (1, tokens), generator=generator)
            rounds.append(one_round(whole, small, folder, ids))
            print(f"{tokens} tokens, round {number}", file=sys.stderr)
        rows.append({"tokens": tokens} | medians(rounds[1:]))  # the first one warms up
    print_table(
        rows,
        {
            "tokens": ("tokens", "d"),
            "read_share": ("read/all experts", ".3f"),
            "reading_seconds": ("reading s", ".2f"),
            "computing_seconds": ("computing s", ".2f"),
            "seconds": ("both s", ".2f"),
            "over_limit": ("over the longer", ".2f"),
        },
    )
    if arguments.json:
        write_json(
            arguments.json,
            "long_prompt",
            layers=arguments.layers,
            memory=arguments.memory,
            load_average=os.getloadavg(),
            rows=rows,
        )


def one_round(whole: Any, small: Any, folder: Path, ids: torch.Tensor) -> dict[str, float]:
    store = small.moeinf.cache.store
    all_experts = store.num_layers * store.num_experts * store.layout.nbytes
    drop_from_page_cache(folder)
    before, start = bytes_read(small), time.perf_counter()
    fill_all(small)
    rate = (bytes_read(small) - before) / (time.perf_counter() - start)
    computing = seconds(whole, ids)
    drop_from_page_cache(folder)
    before = bytes_read(small)
    both = seconds(small, ids)
    reading = all_experts / rate
    return {
        "read_share": (bytes_read(small) - before) / all_experts,
        "reading_seconds": reading,
        "computing_seconds": computing,
        "seconds": both,
        "over_limit": both / max(reading, computing),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def bytes_read(model: Any) -> int:
    stats = model.moeinf.cache.stats()
    return int(stats["demand_bytes"] + stats["prefetch_bytes"])


@torch.inference_mode()
def seconds(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

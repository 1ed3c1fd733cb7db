"""Prefetching by prediction: tokens per second with each predictor and without.

    python -m benchmarks.prefetch --json benchmarks/results/prefetch.json

Each predictor has its own model in one process. For each prompt all models generate in turn, in an
order that rotates, so other work and the state of the disk affect all of them alike. A predictor's
gain is the median over prompts of its tokens/s over those of "off". A second "off" shows the noise.
The limit of any prefetch is "off" without its stalls.

A checkpoint continues the beginnings of Python files. Without a checkpoint, random weights with the
geometry of Qwen3-30B-A3B are written. Their routing has no skew, and the inputs of successive
layers differ much, so they are the hardest case for predictors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint

NOISE = "off, again"
KINDS = ["off", NOISE, "previous", "transition", "eam", "gate"]
TEXTS = [
    "def read_lines(path):\n",
    "import json\n\nclass Config:\n    def __init__(self, ",
    "for name, value in sorted(items.items()):\n",
    "    try:\n        result = self.client.get(url)\n    except ",
    "def mean(values):\n    total = 0\n",
    "# Copies the files that have changed\nimport os\n",
    "    parser.add_argument(",
    "class Node:\n    left = None\n",
]
COLUMNS = {
    "prefetch": ("prefetch", ""),
    "tokens_per_second": ("tokens/s", ".2f"),
    "over_off": ("over off", ".3f"),
    "over_off_low": ("lowest", ".3f"),
    "over_off_high": ("highest", ".3f"),
    "hit_rate": ("hit rate", ".1%"),
    "stall_share": ("stalled", ".1%"),
    "active_share": ("on", ".0%"),
    "gain": ("its own gain", "+.1%"),
    "recall": ("recall", ".1%"),
    "precision": ("precision", ".1%"),
    "precision_among_misses": ("among misses", ".1%"),
    "useful_mb": ("useful MB", ".0f"),
    "wasted_mb": ("wasted MB", ".0f"),
    "late": ("late", "d"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="random weights without it")
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="for random weights")
    parser.add_argument("--layers", type=int, default=4, help="of random weights")
    parser.add_argument("--experts", type=int, default=32, help="per layer of random weights")
    parser.add_argument("--memory", default="25%", help="budget of experts, for each model")
    parser.add_argument("--policy", default="decayed_lfu")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = arguments.checkpoint
    if folder is None:
        folder = arguments.dir / f"prefetch-{arguments.layers}-layers-{arguments.experts}-experts"
        geometry = Geometry(layers=arguments.layers, experts=arguments.experts)
        write_random_checkpoint(folder, geometry)
    rows = measure(folder, arguments)
    print_table(rows, COLUMNS)
    limit = rows[0]["tokens_per_second"] / (1 - rows[0]["stall_share"])
    print(f"limit, off without its stalls: {limit:.2f} tokens/s")
    if arguments.json:
        write_json(
            arguments.json,
            "prefetch",
            checkpoint=folder.name,
            memory=arguments.memory,
            policy=arguments.policy,
            prompts=arguments.prompts,
            tokens=arguments.tokens,
            limit_tokens_per_second=limit,
            rows=rows,
        )


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    models: dict[str, Any] = {
        kind: moeinf.load(
            folder,
            memory=arguments.memory,
            policy=arguments.policy,
            prefetch=kind.partition(",")[0],
        )
        for kind in KINDS
    }
    prompts = prompts_for(folder, models["off"].config.vocab_size, arguments.prompts + 1)
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds = dict.fromkeys(KINDS, 0.0)
    for number, prompt in enumerate(prompts, -1):  # the first only fills slots
        shift = number % len(KINDS)
        for kind in KINDS[shift:] + KINDS[:shift]:
            spent, decoding = generate(models[kind], prompt, arguments.tokens)
            if number < 0:
                models[kind].moeinf.reset_stats()
                continue
            seconds[kind] += spent
            speeds[kind].append((arguments.tokens - 1) / decoding)
    return [
        _row(kind, models[kind].moeinf.stats(), speeds[kind], speeds["off"], seconds[kind])
        for kind in KINDS
    ]


def prompts_for(folder: Path, vocabulary: int, count: int) -> list[torch.Tensor]:
    if (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, 16), generator=generator) for _ in range(count)]


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of everything, and of all tokens after the first."""
    times: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    with torch.inference_mode():
        model.generate(
            prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Clock(),
            pad_token_id=0,
        )
    return times[-1] - times[0], times[-1] - times[1]  # times[0] is the prompt itself


def _row(
    kind: str, stats: dict[str, Any], speeds: list[float], off: list[float], seconds: float
) -> dict[str, Any]:
    gains = [speed / other for speed, other in zip(speeds, off, strict=True)]
    row = {
        "prefetch": kind,
        "tokens_per_second": statistics.median(speeds),
        "over_off": statistics.median(gains),
        "over_off_low": min(gains),
        "over_off_high": max(gains),
        "hit_rate": stats["hit_rate"],
        "stall_share": stats["stall_seconds"] / seconds,
    }
    if stats["prefetch"] is None:
        return row
    return {
        **row,
        **stats["prefetch"],
        "useful_mb": stats["prefetch_useful_bytes"] / 1e6,
        "wasted_mb": stats["prefetch_wasted_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()

"""Dense weights of a quantised checkpoint: packed in memory against decoded when they are loaded.

    python -m benchmarks.packed_dense --json benchmarks/results/packed_dense.json

Random weights with the geometry of Qwen3-30B-A3B, 5 of its 48 layers and 16 of its 128 experts, and
a vocabulary of 32,000. Attention and `lm_head` are stored in one format, or in the formats of
llama.cpp's Q4_K_M in a GGUF file; experts in bf16. A round decodes the same tokens, and computes
the same prompt, with the two models in turn. The results are of each side's fastest token and
fastest prompt. "decoded / this" above 1 says that packed is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.gguf_export import Q4_K_M, export
from benchmarks.packed_weights import SCALED, fill_like_weights
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf.checkpoint.formats import MULTIPLIER, SCALES, VALUES

Q4_K_M_FILE = "Q4_K_M"
FORMATS = ("fp8-channel", "mxfp4", "nvfp4", "int4-32", Q4_K_M_FILE)
SIDES = ("decoded", "packed")
PAUSE = 0.02  # seconds: torch's threads spin for a moment
CONFIG = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
}


def store(name: str, stem: str, rows: int, cols: int) -> dict[str, torch.Tensor]:
    """The tensors of a random matrix, as compressed-tensors names them."""
    row = SCALED[name]
    parts = {}
    for piece, (dtype, shape) in row.segments(rows, cols).items():
        parts[piece] = torch.empty(shape, dtype=dtype)
        fill_like_weights("" if piece == VALUES else f".{piece}", row, parts[piece])
    values = parts[VALUES]
    packed = "weight" if row.name == "e4m3" else "weight_packed"
    if row.name == "int4":
        values = values.view(torch.int32)
    tensors = {f"{stem}.{packed}": values, f"{stem}.weight_scale": parts[SCALES]}
    if MULTIPLIER in parts:
        tensors[f"{stem}.weight_global_scale"] = torch.full((1,), 100.0)
    return tensors


def write(place: Path, plain: Path, name: str) -> Path:
    """The checkpoint with packed dense weights; its experts are those of `plain`."""
    if name == Q4_K_M_FILE:
        export(plain, place / "model.gguf", Q4_K_M)
        return place / "model.gguf"
    folder = place / name
    folder.mkdir(parents=True)
    for path in plain.glob("model-layer-*"):
        (folder / path.name).symlink_to(path)
    tensors = {}
    for key, tensor in load_file(plain / "model-dense.safetensors").items():
        stem = key.removesuffix(".weight")
        if stem.endswith(("_proj", "lm_head")):
            tensors |= store(name, stem, *tensor.shape)
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model-dense.safetensors")
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    files = {key: file for key, file in files.items() if file != "model-dense.safetensors"}
    files |= dict.fromkeys(tensors, "model-dense.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder


def decode(model: Any, tokens: int) -> float:
    """Seconds of the fastest token."""
    best = float("inf")
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        known = model(torch.arange(1, 33)[None], past_key_values=cache, logits_to_keep=1)
        for _ in range(tokens):
            token = known.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            known = model(token, past_key_values=cache)
            best = min(best, time.perf_counter() - start)
    return best


def prefill(model: Any, tokens: int) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        model(torch.arange(tokens)[None], logits_to_keep=1)
        return time.perf_counter() - start


def compare(folder: Path, name: str, rounds: int, tokens: int, prompt: int) -> list[dict[str, Any]]:
    models, found = {}, {}
    for side in SIDES:
        start = time.perf_counter()
        model: Any = moeinf.load(folder, device="cpu", memory="100%", dense=side)
        spent = time.perf_counter() - start
        held = [*model.parameters(), *model.buffers()]
        models[side] = model
        found[side] = {
            "format": name,
            "dense": side,
            "load_seconds": spent,
            "dense_bytes": sum({one.data_ptr(): one.nbytes for one in held}.values()),
            "token_ms": float("inf"),
            "prompt_ms": float("inf"),
        }
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 else -1]:
            time.sleep(PAUSE)
            one = found[side]
            one["token_ms"] = min(one["token_ms"], 1e3 * decode(models[side], tokens))
            one["prompt_ms"] = min(one["prompt_ms"], 1e3 * prefill(models[side], prompt))
    for one in found.values():
        one["token_ratio"] = found["decoded"]["token_ms"] / one["token_ms"]
        one["prompt_ratio"] = found["decoded"]["prompt_ms"] / one["prompt_ms"]
    return [*found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    rows = []
    geometry = Geometry(experts=16, vocabulary=arguments.vocabulary)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        plain = Path(place, "plain")
        write_random_checkpoint(plain, geometry)
        for name in arguments.formats:
            path = write(Path(place), plain, name)
            rows += compare(path, name, arguments.rounds, arguments.tokens, arguments.prompt)
            path.unlink() if path.is_file() else shutil.rmtree(path)
    print_table(
        rows,
        {
            "format": ("dense format", ""),
            "dense": ("dense", ""),
            "token_ms": ("ms a token", ".2f"),
            "token_ratio": ("decoded / this", ".2f"),
            "prompt_ms": ("ms a prompt", ".0f"),
            "prompt_ratio": ("decoded / this", ".2f"),
            "dense_bytes": ("bytes held", ","),
            "load_seconds": ("s to load", ".1f"),
        },
    )
    if arguments.json:
        write_json(
            arguments.json, "packed_dense", load_average=os.getloadavg(),
            geometry=geometry.config(), prompt=arguments.prompt, rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    main()

"""Where the time of one decode token goes, with every expert resident.

    python -m benchmarks.token_profile --json benchmarks/results/token_profile.json

Models: the built-in one; 24 layers so narrow that the host's own time is all there is; and random
weights with the geometry of Qwen3-30B-A3B, 5 of its 48 layers, at two sizes of the vocabulary. One
round decodes the same tokens twice, as `linear="torch"` has it and as `linear="auto"` does, and
measures how fast the threads read memory. The result is of each side's fastest token. Timers stand
around modules and functions; a part's time is its own, less that of the parts inside it; an
attention with timers inside runs the model's own forward. `rest` is what no timer sees: Python, and
operators between modules.

Bytes that must move: every dense matrix of the decoder once, and the experts of the token.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, folder_for, write_random_checkpoint
from moeinf.experts import linear
from moeinf.experts.cpu import default_engine
from moeinf.integrations.transformers import torch_threads
from moeinf.memory_read import HugeArea, ReadLimit
from moeinf.pocket import POCKET

PARTS = ("lm_head", "linear", "router", "experts", "attention", "kv cache", "norms", "rest")
PROMPT = 32
PAUSE = 0.02  # seconds: torch's threads spin for a moment
FEW_TOKENS = torch_threads.FEW_TOKENS


class Timers:
    """Seconds by part; a part that runs inside another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = 0.0

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self.inner = self.inner, 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self.inner
                self.inner = outer + spent

        return timed


def part_of(name: str, module: Any) -> str | None:
    if name.endswith("lm_head"):
        return "lm_head"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    kind = type(module).__name__
    if hasattr(module, "moeinf_cache"):
        return "experts"
    if "Router" in kind:
        return "router"
    return "norms" if "Norm" in kind else None


@contextmanager
def timed(model: Any, timers: Timers) -> Iterator[None]:
    """Timers around the parts of a model, while it is open."""
    modules = [one for name, one in model.named_modules() if part_of(name, one)]
    for name, module in model.named_modules():
        if part := part_of(name, module):
            module.forward = timers.around(part, module.forward)
    attend, update = ALL_ATTENTION_FUNCTIONS["sdpa"], DynamicCache.update
    ALL_ATTENTION_FUNCTIONS["sdpa"] = timers.around("attention", attend)
    DynamicCache.update = timers.around("kv cache", update)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        DynamicCache.update = update
        for module in modules:
            del module.forward


def decode(model: Any, tokens: int, timers: Timers | None) -> tuple[float, dict[str, float]]:
    """Seconds of the fastest token, and its parts."""
    prompt = torch.arange(1, PROMPT + 1)[None] % model.config.vocab_size
    best, parts = float("inf"), {}
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        known = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(tokens):
            token = known.logits[:, -1:].argmax(-1)
            if timers is not None:
                timers.seconds.clear()
            start = time.perf_counter()
            known = model(token, past_key_values=cache, use_cache=True)
            spent = time.perf_counter() - start
            if spent < best:
                best, parts = spent, dict(timers.seconds) if timers is not None else {}
    if timers is not None:
        parts["rest"] = best - sum(parts.values())
    return best, parts


def bytes_of_a_token(model: Any) -> int:
    """The weights that one token needs."""
    cache = model.moeinf.cache
    store = cache.store
    embedding = model.get_input_embeddings().weight
    dense = {p.data_ptr(): p.nbytes for p in model.parameters()}
    if embedding.data_ptr() != model.lm_head.weight.data_ptr():
        dense.pop(embedding.data_ptr())  # one row of it
    return sum(dense.values()) + store.num_layers * store.top_k * store.layout.nbytes


def fill(model: Any) -> None:
    """Brings every expert in."""
    cache = model.moeinf.cache
    for layer in range(cache.store.num_layers):
        for lease in cache.waves(layer, list(range(cache.store.num_experts))):
            lease.release()


SIDES = ("torch", "moeinf")
NARROW = Geometry(
    hidden=64, intermediate=64, layers=24, heads=4, kv_heads=2, head_dim=16, vocabulary=256
)


def profile(name: str, folder: Path, rounds: int, tokens: int) -> list[dict[str, Any]]:
    model: Any = moeinf.load(folder, device="cpu", memory="100%")
    fill(model)
    layers: list[Any] = [
        one
        for one in model.modules()
        if type(one) is linear.Linear or hasattr(one, "moeinf_norm") or hasattr(one, "moeinf_rest")
    ]
    ours = [type(one) for one in layers]
    classes = {"moeinf": ours, "torch": [one.__bases__[-1] for one in ours]}
    limit = ReadLimit(default_engine(), HugeArea(512 << 20).bytes.fill_(1))
    timers = Timers()
    seconds = dict.fromkeys(SIDES, float("inf"))
    parts: dict[str, tuple[float, dict[str, float]]] = {side: (float("inf"), {}) for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            for one, kind in zip(layers, classes[side], strict=True):
                one.__class__ = kind
            torch_threads.FEW_TOKENS = 0 if side == "torch" else FEW_TOKENS
            time.sleep(PAUSE)
            seconds[side] = min(seconds[side], decode(model, tokens, None)[0])
            with timed(model, timers):
                parts[side] = min(parts[side], decode(model, tokens, timers), key=lambda x: x[0])
        time.sleep(PAUSE)
        limit.measure()
    nbytes = bytes_of_a_token(model)
    return [
        {
            "model": name,
            "by": side,
            "token_ms": seconds[side] * 1e3,
            "limit_ms": nbytes / limit.best * 1e3,
            "share_of_limit": nbytes / limit.best / seconds[side],
            "bytes": nbytes,
            "read_bandwidth": limit.best,
            "timed_token_ms": parts[side][0] * 1e3,
            **{part: parts[side][1].get(part, 0.0) * 1e3 for part in PARTS},
        }
        for side in SIDES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[15_872, 151_936])
    parser.add_argument("--layers", type=int, default=Geometry.layers)
    parser.add_argument("--dir", type=Path, help="where the random checkpoints are kept")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    rows = profile("built-in", POCKET, arguments.rounds, 4 * arguments.tokens)
    with tempfile.TemporaryDirectory() as place:
        write_random_checkpoint(Path(place), NARROW)
        rows += profile("24 layers of 64 columns", Path(place), arguments.rounds, arguments.tokens)
    for vocabulary in arguments.vocabulary:
        geometry = Geometry(vocabulary=vocabulary, layers=arguments.layers)
        place = arguments.dir or folder_for(geometry) or Path("/var/tmp")
        folder = place / f"moeinf-{arguments.layers}-layers-{vocabulary}"
        write_random_checkpoint(folder, geometry)
        name = f"Qwen3-30B-A3B, {arguments.layers} layers, vocabulary {vocabulary:,}"
        rows += profile(name, folder, arguments.rounds, arguments.tokens)
    columns = {"model": ("model", ""), "by": ("by", ""), "token_ms": ("ms a token", ".2f")}
    columns |= {"limit_ms": ("limit", ".2f"), "share_of_limit": ("share", ".2f")}
    print_table(rows, columns | {part: (part, ".2f") for part in PARTS})
    if arguments.json:
        write_json(arguments.json, "token_profile", load_average=os.getloadavg(), rows=rows)


if __name__ == "__main__":
    main()

"""Routing for benchmarks of the cache: a recorded trace, stretched to another model's geometry.

Stretching keeps what a cache depends on: which experts return, and how soon. Each layer of the
target takes a layer of the trace with its own permutation of experts. A target with more experts
per layer consists of independent copies of the trace, and each copy gives its routes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from moeinf.traces.trace import DECODE, Array, Trace

PROMPT = "import os\nimport sys\n\n\ndef main"


@lru_cache(maxsize=1)  # the same for every model that it is stretched to
def recorded(tokens: int) -> Trace:
    """Decode routing of the built-in model."""
    import moeinf
    from moeinf.pocket import POCKET

    model = moeinf.load(POCKET, device="cpu")
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(POCKET)(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    with model.moeinf.cache.record() as recorder, torch.inference_mode():
        model.generate(**prompt, max_new_tokens=tokens + 1, do_sample=True, temperature=0.7)
    return recorder.trace(model="pocket", source="benchmarks")


def decode_routing(
    path: Path | None, *, tokens: int, layers: int, experts: int, top_k: int, seed: int = 0
) -> Array:
    """int64 [tokens, layers, top_k], distinct ids per token and layer, none of them -1."""
    trace = Trace.load(path) if path else recorded(tokens)
    source = trace.experts[trace.phase == DECODE]
    source = source[(source >= 0).all(axis=(1, 2))]
    if len(source) == 0:
        raise ValueError(f"{trace.name}: expected decode tokens with every route, found none")
    draw = np.random.default_rng(seed)
    copies = -(-experts // trace.num_experts)
    names = copies * trace.num_experts
    routing = np.empty((tokens, layers, top_k), np.int64)
    for layer in range(layers):
        shuffle = draw.permutation(names) % experts
        for token in range(tokens):
            chosen: list[int] = []
            at = token
            while len(chosen) < top_k:  # tokens further on fill up what folding made equal
                for copy in range(copies):
                    row = source[(at + copy * 17) % len(source), layer % trace.num_layers]
                    chosen += shuffle[row + copy * trace.num_experts].tolist()
                chosen = list(dict.fromkeys(chosen))
                at += 1
                if at - token > len(source):
                    chosen += [e for e in range(experts) if e not in chosen]
            routing[token, layer] = chosen[:top_k]
    return routing

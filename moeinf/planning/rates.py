"""What this machine does in a second, measured when a plan is asked for.

The costs of a small model are not those of bytes: a layer has its operators, and a read its
latency. Both come from a run of the built-in model, with all of its experts in memory and with few.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from moeinf import _core
from moeinf.cache.cache import ExpertCache
from moeinf.checkpoint.layout import Layout
from moeinf.checkpoint.store import ExpertStore
from moeinf.experts.checks import DTYPES
from moeinf.experts.cpu import core_expert, default_engine
from moeinf.experts.linear import linear
from moeinf.kernels.forms import ExpertForm
from moeinf.memory_read import HugeArea, memory_read_bandwidth
from moeinf.planning.model import ModelCosts
from moeinf.pocket import POCKET

AREA = 256 << 20  # bytes of weights that take turns: more than a processor keeps
READS = 6  # steps of reads that are timed
TOKENS = 24  # of the built-in model, each way
QUIET = 0.01  # seconds until torch's threads have stopped spinning


@dataclass(frozen=True)
class Rates:
    """
    memory         bytes per second of a plain read by all threads
    disk           bytes per second of experts read into slots, top_k at a time
    dense          bytes per second of linear layers of one token
    layer_seconds  a layer of the decoder beyond the bytes that it reads
    read_seconds   a step that reads experts, beyond the bytes that it reads
    expert_seconds an expert in memory, by format
    """

    memory: float
    disk: float
    dense: float
    layer_seconds: float
    read_seconds: float
    expert_seconds: dict[str, float]


def measure(
    costs: ModelCosts,
    formats: Collection[str] | None = None,
    told: Callable[[str], None] = lambda what: None,
) -> Rates:
    """Takes some seconds. `formats`: of experts, all without it; `told` hears what comes next."""
    told("memory")
    memory = memory_read_bandwidth()
    area = HugeArea(AREA).bytes.fill_(0x3C)  # small numbers in every format
    told("linear layers")
    dense = _dense(area, costs.dtype)
    store = costs.stores[0]
    seconds = {}
    for name, layout in costs.layouts().items():
        if formats is not None and name not in formats:
            continue
        told(f"experts in {name}")
        seconds[name] = expert_seconds(area, layout, store.form, costs.top_k, costs.dtype)
    del area
    told("the disk")
    disk = _disk(store, costs.top_k)
    told("the built-in model")
    layer, read = _layer_and_read(dense)
    return Rates(memory, disk, dense, layer, read, seconds)


def _median(calls: int, call: Callable[[int], object]) -> float:
    """Seconds of a call: the median, for a plan is for the load that the machine has."""
    spent = []
    for number in range(calls):
        start = time.perf_counter()
        call(number)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _dense(area: torch.Tensor, dtype: torch.dtype) -> float:
    """Matrices of 2048 inputs and 2048 outputs in turn, as those of a decoder."""
    size = 2048
    matrices = area.view(dtype)[: AREA // dtype.itemsize // size**2 * size**2].view(-1, size, size)
    x = torch.zeros(1, size, dtype=dtype)
    half = len(matrices) // 4

    def call(number: int) -> None:
        for matrix in matrices[number % 4 * half :][:half]:
            linear(x, matrix)

    with torch.inference_mode():
        return half * size**2 * dtype.itemsize / _median(8, call)


def expert_seconds(
    area: torch.Tensor, layout: Layout, form: ExpertForm, top_k: int, dtype: torch.dtype
) -> float:
    """Seconds of one of the `top_k` experts of a token, whose weights come from memory."""
    count = AREA // layout.slot_bytes
    if count < top_k:  # experts of 16 MB and more: each call has the memory that it needs
        area = HugeArea((top_k + 1) * layout.slot_bytes).bytes.fill_(0x3C)
        count = top_k + 1
    slots = area[: count * layout.slot_bytes].view(count, -1)
    for name, view in layout.views(slots).items():
        if name.endswith((".scales", ".multiplier")):
            view.copy_(torch.full_like(view, 110 if view.dtype == torch.uint8 else 0.01))
    engine, expert = default_engine(), core_expert(form, layout)
    hidden = torch.ones(1, layout.hidden, dtype=dtype)
    ids = torch.arange(top_k)[None]
    weights = torch.full((1, top_k), 1 / top_k, dtype=dtype)
    out = torch.empty_like(hidden)
    inputs = _core.FfnInput(
        hidden=hidden.data_ptr(),
        hidden_dtype=DTYPES[dtype],
        topk_ids=ids.data_ptr(),
        ids_are_int64=True,
        topk_weights=weights.data_ptr(),
        topk_weights_dtype=DTYPES[dtype],
        tokens=1,
        top_k=top_k,
        num_experts=top_k,
    )

    def call(number: int) -> None:
        first = number * top_k
        places = [slots[(first + one) % count].data_ptr() for one in range(top_k)]
        _core.fused_experts_raw(
            engine, expert, inputs, slots=places, out=out.data_ptr(), out_dtype=DTYPES[dtype]
        )

    time.sleep(QUIET)
    return _median(2 * max(8, count // top_k), call) / top_k


def _disk(store: ExpertStore, top_k: int) -> float:
    """Of this checkpoint's own files, past the page cache."""
    count = min(top_k, store.num_experts)
    cache = ExpertCache(store, slots=count, policy="lru")
    rates = []
    for number in range(READS):
        layer = number * store.num_layers // READS
        first = number * count % max(1, store.num_experts - count + 1)
        start = time.perf_counter()
        cache.acquire(layer, list(range(first, first + count))).release()
        rates.append(count * store.layout.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def _layer_and_read(dense: float) -> tuple[float, float]:
    """Seconds of a layer, and of a step that reads, of the built-in model beyond its bytes."""
    from transformers.utils import logging

    from moeinf.integrations.transformers.load import load

    logging.disable_progress_bar()
    store = ExpertStore.open(POCKET)
    top_k = store.top_k or store.num_experts
    resident, reading = (
        _decode(load(POCKET, device="cpu", policy="lru", **budget))
        for budget in ({"memory": "100%"}, {"slots": top_k})
    )
    logging.enable_progress_bar()
    (full, _), (slow, missed) = resident, reading
    layers = store.num_layers
    steps = layers * (1 - (1 - missed) ** top_k) if missed < 1 else layers
    moved = missed * top_k * layers * store.layout.nbytes / _disk(store, 8 * top_k)
    return full / layers, max(0.0, (slow - full - moved) / steps)


def _decode(model: Any) -> tuple[float, float]:
    """Seconds per token, the median, and the share of experts that were not resident."""
    times = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    cache = model.moeinf.cache
    if cache.slots >= cache.store.num_layers * cache.store.num_experts:
        for layer in range(cache.store.num_layers):
            cache.acquire(layer, list(range(cache.store.num_experts))).release()
    model.moeinf.reset_stats()
    with torch.inference_mode():
        model.generate(
            torch.arange(2, 10)[None],
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            streamer=Clock(),
            pad_token_id=0,
        )
    spent = [after - one for one, after in pairwise(times[2:])]
    return statistics.median(spent), 1 - model.moeinf.stats()["hit_rate"]

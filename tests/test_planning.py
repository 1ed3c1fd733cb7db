"""`moeinf plan`: estimates follow from what is measured, what is counted, and nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.checkpoint.folder import Checkpoint
from moeinf.packing.pack import FORMATS
from moeinf.planning import rates as measuring
from moeinf.planning.estimate import (
    CURVE,
    EXACT_FIRST,
    Estimate,
    advise,
    best_policy,
    check_trace,
    estimate,
    hit_rates,
)
from moeinf.planning.model import ModelCosts, read_model
from moeinf.planning.rates import Rates
from moeinf.pocket import POCKET
from moeinf.traces.trace import DECODE, Trace

SLOW_DISK = Rates(
    memory=10e9,
    disk=1e6,
    dense=5e9,
    layer_seconds=1e-4,
    read_seconds=2e-4,
    expert_seconds=dict.fromkeys(("bf16", *EXACT_FIRST), 1e-5),
)


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return read_model(Checkpoint.open(POCKET))


def trace_of(costs: ModelCosts, seed: int, tokens: int = 60) -> Trace:
    """Random routing, each token to distinct experts."""
    draw = np.random.default_rng(seed)
    layers, experts = costs.stores[0].num_layers, costs.stores[0].num_experts
    routed = np.array(
        [[draw.permutation(experts)[: costs.top_k] for _ in range(layers)] for _ in range(tokens)]
    )
    return Trace(
        routed.astype(np.int16), np.zeros(tokens, np.int32), np.full(tokens, DECODE, np.uint8),
        num_experts=experts,
    )  # fmt: skip


def test_what_a_token_reads_is_counted_from_the_model(costs: ModelCosts) -> None:
    model = AutoModelForCausalLM.from_pretrained(POCKET)
    inner, head = model.model, model.lm_head.weight
    read = [p for name, p in inner.layers.named_parameters() if ".experts." not in name]
    assert costs.dense_bytes == 2 * (sum(p.numel() for p in read) + head.numel())
    assert (costs.layers, costs.top_k, costs.total_experts) == (8, 4, 256)
    assert costs.dtype == torch.bfloat16


def test_an_embedding_that_is_the_output_too_is_read_once(tmp_path: Path) -> None:
    sizes: list[int] = []
    for tied in (False, True):
        folder = write_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
        sizes.append(read_model(Checkpoint.open(folder)).dense_bytes)
    assert sizes[0] == sizes[1]


def test_dense_layers_count_as_layers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", "deepseek_v3")
    costs = read_model(Checkpoint.open(folder))
    assert costs.layers == 3 and costs.stores[0].num_layers == 2


def test_the_formats_of_a_plan_are_those_that_a_pack_can_have(tmp_path: Path) -> None:
    bf16: dict[str, Any] = {"dtype": torch.bfloat16}
    fits = write_checkpoint(tmp_path / "a", hidden_size=64, moe_intermediate_size=96, **bf16)
    odd = write_checkpoint(tmp_path / "b", **bf16)  # 40 columns: no whole groups
    assert set(read_model(Checkpoint.open(fits)).layouts()) == set(FORMATS)
    assert set(read_model(Checkpoint.open(odd)).layouts()) == {"bf16", "fp8"}
    for name, layout in read_model(Checkpoint.open(fits)).layouts().items():
        if name != "bf16":
            moeinf.pack(fits, tmp_path / name, format=name)
            packed = read_model(Checkpoint.open(tmp_path / name))
            assert packed.stores[0].layout.nbytes == layout.nbytes
            assert len(packed.layouts()) == 1


def test_every_slot_and_every_byte_counts(costs: ModelCosts) -> None:
    """By hand, where all experts are resident, and where none ever is."""
    layout = costs.layouts()["bf16"]
    full = estimate(costs, SLOW_DISK, "bf16", layout, costs.total_experts)
    by_hand = 8 * (1e-4 + 4 * 1e-5) + costs.dense_bytes / 5e9
    assert 1 / full.tokens_per_second == pytest.approx(by_hand)
    assert full.hit_rate == full.share == 1
    assert full.memory_bytes == costs.total_experts * layout.slot_bytes
    each = np.arange(40 * 8 * 4).reshape(40, 8, 4) % 32  # with 4 slots no expert comes back in time
    trace = Trace(
        each.astype(np.int16), np.zeros(40, np.int32), np.full(40, DECODE, np.uint8), num_experts=32
    )
    none = estimate(costs, SLOW_DISK, "bf16", layout, 4, trace, "lru")
    assert none.hit_rate == 0 and none.low is None and none.high is None
    waits = 8 * (2e-4 + 4 * layout.nbytes / 1e6)  # per token, beside computing what has come
    assert by_hand + waits - 8 * 3e-5 == pytest.approx(1 / none.tokens_per_second, rel=1e-3)


def test_more_memory_and_fewer_bits_are_never_slower(costs: ModelCosts, seed: int) -> None:
    trace = trace_of(costs, seed)
    for given in (None, trace):
        for name, layout in costs.layouts().items():
            speeds = [
                estimate(costs, SLOW_DISK, name, layout, slots, given, "lru").tokens_per_second
                for slots in (8, 32, 96, 160, 256)
            ]
            # Of a trace, LRU has the inclusion property: more slots never miss more.
            assert all(a <= b * (1 + 1e-9) for a, b in pairwise(speeds)), name
        own, int4 = (
            estimate(costs, SLOW_DISK, name, costs.layouts()[name], 32, given, "lru")
            for name in ("bf16", "int4")
        )
        assert int4.tokens_per_second > 2 * own.tokens_per_second


def test_the_curve_has_an_order_and_a_range(costs: ModelCosts) -> None:
    for share in [*CURVE, *(random.random() for _ in range(50))]:
        low, middle, high = hit_rates(share)
        assert min(share, 1) <= low + 1e-12 and low <= middle <= high <= 1
    one = estimate(costs, SLOW_DISK, "bf16", costs.layouts()["bf16"], 64)
    assert one.low is not None and one.high is not None
    assert one.low < one.tokens_per_second < one.high


def test_a_trace_of_another_model_is_refused(costs: ModelCosts, seed: int) -> None:
    trace = trace_of(costs, seed)
    check_trace(trace, costs)
    other = Trace(trace.experts[:, :7], trace.sequence, trace.phase, num_experts=32, name="x")
    with pytest.raises(ValueError, match="x: expected a trace of 8 layers of 32 experts, 4"):
        check_trace(other, costs)


def test_the_advice(costs: ModelCosts, seed: int) -> None:
    def speeds(**found: float) -> list[Estimate]:
        return [Estimate(name, 1, 0.1, 1, 0.5, speed) for name, speed in found.items()]

    same = advise(speeds(bf16=10, int8=10.5, int4=11), 100, "learned")
    assert same.pack_format is None and same.tokens_per_second == 10
    exact = advise(speeds(bf16=10, fp8=29, int8=28, int4=30, mxfp4=30.5), 100, "learned")
    assert exact.pack_format == "int8"  # the most exact of those within a tenth of the fastest
    lossless = advise(speeds(bf16=10, int8=15) + speeds(**{"bf16-palette": 14}), 100, "learned")
    assert lossless.pack_format == "bf16-palette"
    small = advise(speeds(bf16=10, fp8=15, int8=14, int4=30, mxfp4=31), 100, "learned")
    assert (small.pack_format, small.pack_tokens_per_second) == ("int4", 30)
    assert advise(speeds(e4m3=10), 100, "lru").pack_format is None
    assert best_policy(None, 10) == "learned"
    assert best_policy(trace_of(costs, seed), 40) in moeinf.policies()


def test_rates_are_measured_and_sound(costs: ModelCosts) -> None:
    found = measuring.measure(costs, ["bf16", "int4"])
    assert set(found.expert_seconds) == {"bf16", "int4"}
    assert 1e8 < found.memory < 1e13 and 1e5 < found.disk < 1e12 and 1e6 < found.dense < 1e13
    assert 1e-6 < found.layer_seconds < 30 and 0 <= found.read_seconds < 30
    for seconds in found.expert_seconds.values():
        assert 1e-8 < seconds < 30


def test_the_command(tmp_path: Path) -> None:
    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moeinf.cli", "plan", *words]
        return subprocess.run(command, capture_output=True, text=True)

    done = plan("--json", "--memory", "auto,25%,1MiB")
    facts = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [one["memory"] for one in facts["budgets"]] == ["auto", "25%", "1MiB"]
    for budget in facts["budgets"]:
        assert budget["fits"] and [one["format"] for one in budget["estimates"]] == [*FORMATS]
        for one in budget["estimates"]:
            assert one["memory_bytes"] <= budget["bytes"]
            assert 0 < one["low"] <= one["tokens_per_second"] <= one["high"]
    assert facts["advice"]["format"] == "bf16" and facts["device"] == "cpu"
    shown = plan("--memory", "25%")
    assert shown.returncode == 0 and "Run it with --memory" in shown.stdout
    for words, message in (
        (("--memory", "1KiB"), "1,024 bytes are below one slot of"),
        (("--memory", ","), "expected at least one budget"),
        (("--trace", str(tmp_path / "none")), "none"),
        ((str(tmp_path),), "config.json"),
    ):
        failed = plan(*words)
        assert failed.returncode == 1 and message in failed.stderr, failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1

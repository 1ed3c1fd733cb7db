"""What a live cache records is what it did: replayed, the trace gives the same hits to the unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import COMMON, write_checkpoint

import moeinf
from moeinf.trace import DECODE, PREFILL, Trace


def prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "classlru", "eam", "best"])
@pytest.mark.parametrize("slots", [1, 5, 12])
def test_a_simulation_of_its_own_trace_counts_the_same(
    qwen3_folder: Path, policy: str, slots: int, seed: int
) -> None:
    model = moeinf.load(qwen3_folder, slots=slots, policy=policy)
    with model.moeinf.cache.record() as recorder:
        for turn in range(3):
            model.generate(prompt(seed + turn, 1, 5 + turn), max_new_tokens=9, do_sample=False)
    live = model.moeinf.stats()
    replayed = moeinf.simulate(recorder.trace(), policy=policy, slots=slots)
    assert (live["hits"], live["accesses"]) == (replayed.hits, replayed.accesses)


def test_a_trace_holds_the_routing_of_every_token(qwen3_folder: Path, tmp_path: Path) -> None:
    model = moeinf.load(qwen3_folder, slots=4)
    cache = model.moeinf.cache
    seen: list[torch.Tensor] = []
    compute = cache.compute
    cache.compute = lambda *a: (seen.append(a[1].clone()), compute(*a))[1]  # type: ignore[method-assign]
    with cache.record() as recorder:
        model.generate(prompt(0, 1, 4), max_new_tokens=3, do_sample=False)
        model.generate(prompt(1, 1, 2), max_new_tokens=2, do_sample=False)
    trace = recorder.trace(model="tiny")
    assert trace.sequence.tolist() == [0] * 6 + [1] * 3
    assert trace.phase.tolist() == [PREFILL] * 4 + [DECODE] * 2 + [PREFILL] * 2 + [DECODE]
    by_pass = [torch.stack(seen[i : i + 3], dim=1) for i in range(0, len(seen), 3)]
    assert trace.experts.tolist() == torch.cat(by_pass).tolist()
    trace.save(tmp_path / "t.safetensors")
    assert Trace.load(tmp_path / "t.safetensors").experts.tolist() == trace.experts.tolist()


def test_a_batch_is_recorded_sequence_after_sequence(tmp_path: Path, seed: int) -> None:
    write_checkpoint(tmp_path)
    model = moeinf.load(tmp_path)
    inputs = prompt(seed, 3, 4)
    with model.moeinf.cache.record() as recorder, torch.inference_mode():
        model(inputs)
    trace = recorder.trace()
    assert trace.sequence.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with model.moeinf.cache.record() as recorder, torch.inference_mode():
        model(inputs[1:2])
    assert recorder.trace().experts.tolist() == trace.experts[4:8].tolist()


def test_a_runtime_that_does_not_announce_its_passes(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    with cache.record() as recorder:
        for tokens in (5, 1, 1, 2):
            for layer in range(3):
                moeinf.fused_experts(
                    torch.randn(tokens, 40),
                    torch.tensor([[layer, 3]] * tokens),
                    torch.ones(tokens, 2),
                    cache,
                    layer,
                )
    trace = recorder.trace()
    assert trace.sequence.tolist() == [0] * 7 + [1] * 2
    assert trace.phase.tolist() == [PREFILL] * 5 + [DECODE] * 2 + [PREFILL] * 2


def test_nothing_recorded(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    with pytest.raises(ValueError, match="nothing was recorded"):
        cache.record().trace()

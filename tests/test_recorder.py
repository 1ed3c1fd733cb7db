"""A replay of the trace that a live cache recorded has exactly the hits of the live cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import COMMON, write_checkpoint

import moeinf
from moeinf.experts.op import backend_of
from moeinf.traces.trace import DECODE, PREFILL, Trace


def prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


@pytest.mark.parametrize("policy", moeinf.policies())
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


class Heat:
    """Priors of decayed use, and a few answers that are no priors."""

    def __init__(self, nonsense: dict[int, Any] | None = None) -> None:
        self.heat = np.zeros((3, 6))
        self.nonsense = nonsense or {}
        self.calls = 0

    def observe(self, experts: Any, new_sequence: bool) -> Any:
        self.heat *= 0.5 if new_sequence else 0.9
        for layer, routed in enumerate(experts.transpose(1, 0, 2)):
            self.heat[layer, routed] += 0.1
        self.calls += 1
        answer = self.nonsense.get(self.calls, self.heat)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_hook_sees_live_what_it_sees_in_a_simulation(qwen3_folder: Path, seed: int) -> None:
    live_hook, hook = Heat(), Heat()
    model = moeinf.load(qwen3_folder, slots=5, priors=live_hook)
    with model.moeinf.cache.record() as recorder:
        for turn in range(3):
            model.generate(prompt(seed + turn, 1, 4), max_new_tokens=9, do_sample=False)
    live = model.moeinf.stats()
    replayed = moeinf.simulate(recorder.trace(), policy="learned", slots=5, priors=hook)
    assert (live["hits"], live["accesses"]) == (replayed.hits, replayed.accesses)
    assert live_hook.calls == hook.calls


@pytest.mark.parametrize(
    "nonsense", [RuntimeError("oops"), np.full((3, 6), np.nan), np.zeros((2, 2)), "priors"]
)
def test_a_hook_that_fails_warns_once_and_the_run_goes_on(
    qwen3_folder: Path, nonsense: Any, seed: int
) -> None:
    hook = Heat({2: nonsense, 4: nonsense})
    model = moeinf.load(qwen3_folder, slots=5, priors=hook)
    with pytest.warns(RuntimeWarning, match="the last good priors stay") as caught:
        model.generate(prompt(seed, 1, 4), max_new_tokens=9, do_sample=False)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert hook.calls == 9


def test_a_trace_holds_the_routing_of_every_token(qwen3_folder: Path, tmp_path: Path) -> None:
    model = moeinf.load(qwen3_folder, slots=4)
    cache = model.moeinf.cache
    seen: list[torch.Tensor] = []
    backend = backend_of(cache.name)
    run = backend.run
    backend.run = lambda *a: (seen.append(a[1].clone()), run(*a))[1]  # type: ignore[method-assign]
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


def test_a_pass_cut_short_is_dropped(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    steps = [(0, 2), (1, 2), (2, 1), (0, 1), (1, 1), (0, 1), (1, 1), (2, 1)]  # (layer, tokens)
    with cache.record() as recorder:
        for layer, tokens in steps:
            ids = torch.tensor([[layer, 3]] * tokens)
            moeinf.fused_experts(torch.randn(tokens, 40), ids, torch.ones(tokens, 2), cache, layer)
    assert recorder.trace().experts.tolist() == [[[0, 3], [1, 3], [2, 3]]]


def test_nothing_recorded(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    with pytest.raises(ValueError, match="nothing was recorded"):
        cache.record().trace()

"""The simulator against a slow implementation of the counting rules that shares no code with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from random_traces import random_trace

import moeinf
from moeinf.traces.simulator import SimulationResult, parse_slots, policy_names
from moeinf.traces.time_model import estimate_time
from moeinf.traces.trace import Trace


def steps_of(trace: Trace) -> list[tuple[bool, list[tuple[int, int]]]]:
    """(is decode, distinct (layer, expert) in order of first appearance), step by step."""
    steps = []
    token = 0
    while token < trace.num_tokens:
        end = token + 1
        if trace.phase[token] == 0:
            while (
                end < trace.num_tokens
                and trace.phase[end] == 0
                and trace.sequence[end] == trace.sequence[token]
            ):
                end += 1
        for layer in range(trace.num_layers):
            needed: list[tuple[int, int]] = []
            for t in range(token, end):
                for expert in trace.experts[t, layer].tolist():
                    if expert >= 0 and (layer, expert) not in needed:
                        needed.append((layer, expert))
            steps.append((trace.phase[token] == 1, needed))
        token = end
    return steps


def count(trace: Trace, policy: str, slots: int) -> tuple[int, int, int, int]:
    """(decode hits, decode accesses, hits, accesses)"""
    steps = steps_of(trace)
    uses: dict[tuple[int, int], list[int]] = {}
    for index, (_, needed) in enumerate(steps):
        for expert in needed:
            uses.setdefault(expert, []).append(index)

    def leaves_first(expert: tuple[int, int], now: int) -> tuple[Any, ...]:
        past = [use for use in uses[expert] if use <= now]
        future = [use for use in uses[expert] if use > now]
        if policy == "lru":
            return (past[-1], expert)
        if policy == "lfu":
            return (len(past), past[-1], expert)
        return (-future[0] if future else -math.inf, expert)

    resident: set[tuple[int, int]] = set()
    totals = [0, 0, 0, 0]
    for index, (is_decode, needed) in enumerate(steps):
        hits = len(resident & set(needed))
        totals[2] += hits
        totals[3] += len(needed)
        if is_decode:
            totals[0] += hits
            totals[1] += len(needed)
        for expert in needed:
            if expert in resident:
                continue
            if len(resident) == slots:
                others = resident - set(needed)
                if not others:
                    continue
                resident.remove(min(others, key=lambda e: leaves_first(e, index)))
            resident.add(expert)
    return tuple(totals)


def totals(result: SimulationResult) -> tuple[int, int, int, int]:
    return (
        int(result.decode_hits.sum()),
        int(result.decode_accesses.sum()),
        result.hits,
        result.accesses,
    )


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
@pytest.mark.parametrize("slots", [1, 2, 5, 13, 30, 54, 55, 70])
def test_hits_equal_an_independent_count_to_the_unit(policy: str, slots: int, seed: int) -> None:
    for i in range(3):
        trace = random_trace(seed + i)
        found = totals(moeinf.simulate(trace, policy=policy, slots=slots))
        assert found == count(trace, policy, slots), trace.name


def test_no_policy_beats_belady_and_every_one_counts_the_same_accesses(seed: int) -> None:
    trace = random_trace(seed, layers=7, num_experts=19, k=4)
    for slots in (3, 20, 60):
        best = moeinf.simulate(trace, policy="belady", slots=slots)
        for policy in policy_names():
            result = moeinf.simulate(trace, policy=policy, slots=slots)
            assert result.hits <= best.hits, policy
            assert result.accesses == best.accesses


@pytest.mark.parametrize("policy", policy_names())
def test_with_room_for_all_only_first_uses_miss(policy: str, seed: int) -> None:
    trace = random_trace(seed)
    used = {expert for _, needed in steps_of(trace) for expert in needed}
    result = moeinf.simulate(trace, policy=policy, slots=trace.total_experts)
    assert result.accesses - result.hits == len(used)
    assert result.evictions.sum() == 0


@pytest.mark.parametrize("policy", ["lru", "classlru", "eam", "learned"])
def test_the_same_trace_gives_the_same_counts_again(policy: str, seed: int) -> None:
    trace = random_trace(seed)
    first, second = (moeinf.simulate(trace, policy=policy, slots="30%") for _ in range(2))
    assert first.as_dict() == second.as_dict()


def test_a_python_policy_decides_like_its_compiled_twin(seed: int) -> None:
    class Lru:
        def __init__(self, total: int) -> None:
            self.last = np.full(total, -1)

        def observe(self, step: Any) -> None:
            self.last[step.experts] = step.index

        def score(self, residents: np.ndarray) -> np.ndarray:
            return self.last[residents]

    trace = random_trace(seed)
    twin = moeinf.simulate(trace, policy=Lru(trace.total_experts), slots=17)
    assert totals(twin) == totals(moeinf.simulate(trace, policy="lru", slots=17))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda residents: np.full(len(residents), np.nan), "NaN"),
        (lambda residents: np.zeros(len(residents) + 1), "one value for each"),
        (lambda residents: np.zeros((len(residents), 2)), "2 dimensions"),
    ],
)
def test_a_python_policy_that_answers_nonsense_is_refused(answer: Any, message: str) -> None:
    class Broken:
        def observe(self, step: Any) -> None:
            pass

        def score(self, residents: np.ndarray) -> np.ndarray:
            return answer(residents)

    with pytest.raises(ValueError, match=message):
        moeinf.simulate(random_trace(1), policy=Broken(), slots=5)


def test_an_error_in_a_python_policy_reaches_the_caller() -> None:
    class Raises:
        def observe(self, step: Any) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        moeinf.simulate(random_trace(1), policy=Raises(), slots=5)


def test_steps_show_a_policy_what_the_trace_holds(seed: int) -> None:
    trace = random_trace(seed, layers=2, num_experts=5, k=2)
    router = np.random.default_rng(seed).random((trace.num_tokens, 2, 5)).astype(np.float16)
    trace = Trace.from_arrays(
        trace.experts,
        num_experts=5,
        sequence=trace.sequence,
        phase=trace.phase,
        router=router,
    )
    seen: list[Any] = []

    class Watcher:
        def observe(self, step: Any) -> None:
            seen.append(step)

        def score(self, residents: np.ndarray) -> np.ndarray:
            return np.zeros(len(residents))

    moeinf.simulate(trace, policy=Watcher(), slots=4)
    expected = steps_of(trace)
    assert len(seen) == len(expected)
    token = 0
    for index, (step, (is_decode, needed)) in enumerate(zip(seen, expected, strict=True)):
        layer = index % 2
        assert (step.index, step.layer, step.prefill) == (index, layer, not is_decode)
        assert step.experts.tolist() == [layer * 5 + expert for _, expert in needed]
        end = token + 1
        while not is_decode and end < trace.num_tokens and trace.phase[end] == 0:
            if trace.sequence[end] != trace.sequence[token]:
                break
            end += 1
        routed = trace.experts[token:end, layer].ravel().tolist()
        assert step.counts.tolist() == [routed.count(expert) for _, expert in needed]
        np.testing.assert_allclose(
            step.router, router[token:end, layer].astype(np.float64).mean(0), rtol=1e-5, atol=1e-7
        )
        first = token == 0 or trace.sequence[token] != trace.sequence[token - 1]
        assert step.new_sequence == (layer == 0 and first)
        if layer == 1:
            token = end


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("5%", 768, 38),
        ("10%", 6144, 614),
        ("0.5%", 300, 2),
        ("100%", 7, 7),
        ("12", 7, 12),
        (3, 9, 3),
    ],
)
def test_slots_are_counts_or_shares(text: str, total: int, expected: int) -> None:
    assert parse_slots(text, total) == expected


@pytest.mark.parametrize(
    "slots", [0, -1, "0", "0%", "0.01%", "-5%", "nan%", "many", "", "1.5", 2**31]
)
def test_budgets_that_are_none_are_refused(slots: str) -> None:
    with pytest.raises(ValueError, match="slots"):
        moeinf.simulate(random_trace(1), slots=slots)


@pytest.mark.parametrize("slots", [56, "150%", 2**31 - 1])
@pytest.mark.parametrize("policy", policy_names())
def test_a_budget_above_all_experts_is_room_for_all(
    slots: int | str, policy: str, seed: int
) -> None:
    trace = random_trace(seed)
    all_there = moeinf.simulate(trace, policy=policy, slots=55)
    assert totals(moeinf.simulate(trace, policy=policy, slots=slots)) == totals(all_there)


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'lur'.*lru.*belady"):
        moeinf.simulate(random_trace(1), policy="lur", slots=3)


def test_progress_rises_to_the_end_and_may_stop_the_run(seed: int) -> None:
    trace = random_trace(seed, layers=1, sequences=2, decode=5)
    long = Trace.concat([trace] * 1500)
    seen: list[int] = []
    moeinf.simulate(long, policy="lru", slots=3, progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == long.num_tokens

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        moeinf.simulate(long, policy="lru", slots=3, progress=stop)


def hand_made(misses: list[list[int]]) -> SimulationResult:
    zeros = np.zeros(len(misses[0]), np.int64)
    return SimulationResult(
        "t", "p", 1, zeros, zeros, zeros, zeros, zeros,
        misses=np.array(misses, np.uint16),
        decode_pass=np.ones(len(misses), bool),
    )  # fmt: skip


def test_without_a_window_every_copy_is_a_stall() -> None:
    estimate = estimate_time(
        hand_made([[2, 0], [1, 3]]),
        expert_bytes=10,
        link_bandwidth=100,
        compute_seconds_per_layer=0.5,
    )
    assert estimate.stall_seconds_per_token == pytest.approx((2 + 0 + 1 + 3) * 0.1 / 2)
    assert estimate.seconds_per_token == pytest.approx(0.3 + 2 * 0.5)


def test_a_window_hides_copies_behind_computation_up_to_its_length() -> None:
    # One layer ahead: the copies of a step run while the step before it computes.
    estimate = estimate_time(
        hand_made([[0, 4], [0, 7]]),
        expert_bytes=10,
        link_bandwidth=100,
        compute_seconds_per_layer=0.5,
        prefetch_window=1,
    )
    assert estimate.stall_seconds_per_token == pytest.approx((0 + (0.7 - 0.5)) / 2)


def test_the_disk_share_of_misses_costs_the_disk_too() -> None:
    estimate = estimate_time(
        hand_made([[4]]),
        expert_bytes=10,
        link_bandwidth=100,
        compute_seconds_per_layer=0,
        disk_bandwidth=50,
        disk_share=0.25,
    )
    assert estimate.stall_seconds_per_token == pytest.approx(4 * (0.1 + 0.25 * 0.2))


def test_latency_is_paid_once_a_step_and_resident_experts_are_computed_meanwhile() -> None:
    # Steps of 4 experts at 0.05 s each. 1 miss: it is there at 0.3 + 0.1, 3 others took 0.15.
    # 4 misses: the last is there at 0.7, when 3 others took 0.15.
    result = replace(hand_made([[0], [1], [4]]), decode_accesses=np.array([12]))
    estimate = estimate_time(
        result,
        expert_bytes=10,
        link_bandwidth=100,
        latency_seconds=0.3,
        compute_seconds_per_layer=0.5,
        compute_seconds_per_expert=0.05,
    )
    assert estimate.stall_seconds_per_token == pytest.approx((0.25 + 0.55) / 3)
    assert estimate.seconds_per_token == pytest.approx(0.8 / 3 + 0.5)


def test_times_need_misses_and_sound_values(seed: int) -> None:
    kept = moeinf.simulate(random_trace(seed), slots=9, keep_misses=True)
    assert kept.misses is not None and kept.misses.sum() == kept.accesses - kept.hits
    sound = {"expert_bytes": 1.0, "link_bandwidth": 1.0, "compute_seconds_per_layer": 0.0}
    assert estimate_time(kept, **sound).stall_seconds_per_token == pytest.approx(
        kept.misses[kept.decode_pass].sum() / kept.decode_pass.sum()
    )
    with pytest.raises(ValueError, match="keep_misses"):
        estimate_time(moeinf.simulate(random_trace(seed), slots=9), **sound)
    for bad in ({"link_bandwidth": 0.0}, {"disk_share": 2.0}, {"latency_seconds": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            estimate_time(kept, **(sound | bad))

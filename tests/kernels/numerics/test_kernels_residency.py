"""A layer's bits do not depend on where its experts lie, nor on how it is cut into waves."""

from __future__ import annotations

import random

import pytest
import small_blocks
import torch
from layers import DEVICE, TOLERANCE, Layer, Slots, error, resident, slot_ids

from moeinf.kernels import ExpertMatrices, combine, expert_routes, fused_experts

PATHS = (("vector", 1), ("shared", 6), ("grouped", 20))


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_may_be_permuted(
    path: str, T: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    layer = Layer(T, 3, 6, 50, 37, dtype, seed=seed, bias=True)
    results = []
    for place in range(3):
        slots, where = resident(layer, spare=1 + 4 * place, seed=seed + place)
        results.append(
            fused_experts(
                layer.hidden.to(DEVICE),
                slot_ids(layer.ids, where),
                layer.weights.to(DEVICE),
                *slots.weights(),
                path=path,
            )
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_into_waves_gives_the_same_bits(
    path: str, T: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    draw = random.Random(seed)
    layer = Layer(T, 3, 7, 50, 37, dtype, seed=seed, bias=True)
    if T > 1:
        layer.ids[1, 2] = layer.ids[1, 0]
        layer.ids[2, 1] = -1
    hidden, weights = layer.hidden.to(DEVICE), layer.weights.to(DEVICE)
    slots, where = resident(layer)
    whole = fused_experts(
        hidden, slot_ids(layer.ids, where), weights, *slots.weights(), path=path, out=None
    )
    for count in (1, 2, 3):
        # Only `count` slots, refilled for each wave; what an earlier wave left is poisoned.
        slots = Slots(layer, count)
        named = [e for e in range(layer.E) if e in layer.ids]
        draw.shuffle(named)
        routes = None
        for first in range(0, len(named), count):
            wave = torch.full((layer.E,), -1, device=DEVICE)
            for slot in range(count):
                slots.empty(slot)
            for slot, expert in enumerate(named[first : first + count]):
                slots.fill(slot, expert)
                wave[expert] = slot
            routes = expert_routes(
                hidden, slot_ids(layer.ids, wave), *slots.weights(), routes=routes, path=path
            )
        assert routes is not None
        assert torch.equal(combine(routes, layer.ids.to(DEVICE), weights, dtype=dtype), whole)


def test_a_wave_leaves_the_routes_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    for path, T in PATHS:
        layer = Layer(T, 2, 4, 33, 20)
        slots, where = resident(layer)
        where[int(layer.ids[0, 1])] = -1
        ids = slot_ids(layer.ids, where)
        routes = torch.full((T, 2, 33), -5.0, device=DEVICE)
        expert_routes(layer.hidden.to(DEVICE), ids, *slots.weights(), routes=routes, path=path)
        assert (routes[ids < 0] == -5).all() and (routes[ids >= 0] != -5).all()


@pytest.mark.parametrize("path,T", PATHS)
def test_slots_beyond_two_to_the_31_elements(
    path: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slot 2 begins 2^31 elements into the pool; all between the slots is never touched."""
    small_blocks.use(monkeypatch)
    layer = Layer(T, 2, 2, 20, 10, torch.float16)
    stride = 1 << 30
    arena = torch.empty(2 * stride + (1 << 12), dtype=torch.float16, device=DEVICE)
    gate_up = torch.as_strided(arena, (3, 20, 20), (stride, 20, 1))
    down = torch.as_strided(arena, (3, 20, 10), (stride, 10, 1), 1 << 10)
    for expert, slot in enumerate((2, 0)):
        stored = layer.stored(expert)
        gate_up[slot], down[slot] = stored["gate_up"].to(DEVICE), stored["down"].to(DEVICE)
    out = fused_experts(
        layer.hidden.to(DEVICE), (2 - 2 * layer.ids).to(DEVICE), layer.weights.to(DEVICE),
        ExpertMatrices.of_fused(gate_up, down), layer.form, path=path,
    )  # fmt: skip
    assert error(out, layer.expected()) <= TOLERANCE[torch.float16]

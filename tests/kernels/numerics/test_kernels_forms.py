"""Every form a model needs gives the float64 answer, whatever the sizes."""

from __future__ import annotations

import random

import pytest
import small_blocks
import torch
from layers import DEVICE, TOLERANCE, Layer, error, resident, slot_ids

from moeinf.kernels import experts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# path, tokens: one token, a few that share experts, and more than decode takes.
PATHS = (("vector", 1), ("vector", 3), ("shared", 5), ("grouped", 19))


def compute(layer: Layer, path: str | None, spare: int = 2) -> torch.Tensor:
    slots, where = resident(layer, spare)
    weights, biases = slots.arguments()
    return experts(
        layer.hidden.to(DEVICE), slot_ids(layer.ids, where), layer.weights.to(DEVICE),
        *weights, **biases, **layer.options(), path=path,
    )  # fmt: skip


def check(layer: Layer, path: str | None) -> None:
    assert error(compute(layer, path), layer.expected()) <= TOLERANCE[layer.dtype], layer


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(path: str, T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(T, 2, 5, 80, 48, dtype), path)


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped"]
)
def test_activations(path: str, T: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    # Gates large enough for the clamp at 7 to matter.
    check(Layer(T, 2, 3, 40, 24, activation=activation, scale=4.0, bias=True), path)


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize(
    "form",
    [
        {"gated": False, "activation": "relu2"},
        {"gated": False, "bias": True, "transposed": True},
        {"interleaved": True},
        {"transposed": True},
        {"bias": True},
        {
            "interleaved": True, "transposed": True, "bias": True, "alpha": 1.5, "limit": 2.0,
            "activation": "swiglu_clamped", "scale": 3.0,
        },
    ],
    ids=str,
)  # fmt: skip
def test_weight_forms(
    path: str, T: int, form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(T, 3, 4, 70, 33, **form), path)


@pytest.mark.parametrize("k", range(1, 17))
def test_every_number_of_routes(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(1, k, 18, 17, 9, seed=k), "vector")
    check(Layer(3, k, 18, 17, 9, seed=k), "shared")


@pytest.mark.parametrize("path", ["vector", "shared", "grouped"])
def test_odd_sizes(path: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    small_blocks.use(monkeypatch)
    for H, I in ((1, 1), (1, 37), (67, 1), (33, 65), (129, 31)):  # noqa: E741
        T = 1 if path == "vector" else draw.randint(1, 16 if path == "shared" else 40)
        E = draw.randint(1, 7)
        check(Layer(T, draw.randint(1, E), E, H, I, seed=seed), path)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17])
def test_default_path_for_any_number_of_tokens(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(T, 2, 6, 48, 20, torch.float16), None)


@pytest.mark.parametrize("path,T", PATHS)
def test_committed_block_sizes(path: str, T: int) -> None:
    check(Layer(min(T, 17), 2, 3, 40, 24, torch.bfloat16), path)


@pytest.mark.parametrize("path,T", PATHS)
def test_absent_and_repeated_experts(path: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    layer = Layer(T, 4, 5, 48, 20)
    layer.ids[:, 1] = -1
    layer.ids[0] = torch.tensor([2, -1, 2, 2])
    check(layer, path)
    layer.ids[:] = -1
    assert torch.equal(compute(layer, path), torch.zeros(T, 48, device=DEVICE))


@pytest.mark.parametrize("path,T", PATHS)
def test_hidden_and_out_may_be_strided_and_weights_any_float(
    path: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    layer = Layer(T, 2, 3, 40, 24, torch.float16)
    layer.weights = layer.weights.half().float()
    slots, where = resident(layer)
    wide = torch.full((T, 56), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[:, :40] = layer.hidden.to(DEVICE)
    out = torch.full((T, 64), 3.0, dtype=torch.float16, device=DEVICE)
    weights, _ = slots.arguments()
    experts(
        wide[:, :40], slot_ids(layer.ids, where).int(), layer.weights.half().to(DEVICE), *weights,
        out=out[:, 8:48], path=path,
    )  # fmt: skip
    assert error(out[:, 8:48], layer.expected()) <= TOLERANCE[torch.float16]
    assert (out[:, :8] == 3).all() and (out[:, 48:] == 3).all()


@pytest.mark.parametrize("path,T", PATHS)
def test_the_form_of_vllm(path: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert ids with an expert_map [E] -> local id or -1 give the bits of the slot ids."""
    small_blocks.use(monkeypatch)
    layer = Layer(T, 3, 6, 48, 20)
    slots, where = resident(layer)
    (w13, w2), _ = slots.arguments()
    where[int(layer.ids[0, 0])] = -1
    hidden, weights = layer.hidden.to(DEVICE), layer.weights.to(DEVICE)
    mapped = experts(
        hidden, layer.ids.int().to(DEVICE), weights, w13, w2, expert_map=where.int(), path=path,
        num_experts=6,
    )  # fmt: skip
    direct = experts(hidden, slot_ids(layer.ids, where), weights, w13, w2, path=path, num_experts=6)
    assert torch.equal(mapped, direct)
    absent = torch.where(layer.ids == layer.ids[0, 0], -1, layer.ids)
    assert error(mapped, layer.expected(absent)) <= TOLERANCE[torch.float32]

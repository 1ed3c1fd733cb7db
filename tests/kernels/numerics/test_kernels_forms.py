"""Every form a model needs gives the float64 answer, whatever the sizes."""

from __future__ import annotations

import itertools
import random

import pytest
import small_blocks
import torch
from layers import (
    DEVICE,
    ROW_TOLERANCE,
    TOLERANCE,
    Layer,
    error,
    resident,
    row_error,
    slot_ids,
)

from moeinf.kernels import ExpertMatrices, Matrix, fused_experts
from moeinf.kernels.gates import ACTIVATIONS, GATES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# path, tokens: one token, a few that share experts, and more than decode takes.
PATHS = (("vector", 1), ("vector", 3), ("shared", 5), ("grouped", 19))
GATE_ROWS = [
    (function, activation)
    for function, activation in itertools.product(GATES, ACTIVATIONS)
    if activation == "silu" or "activation" in GATES[function].constants
]


def compute(layer: Layer, path: str | None, spare: int = 2) -> torch.Tensor:
    slots, where = resident(layer, spare)
    return fused_experts(
        layer.hidden.to(DEVICE), slot_ids(layer.ids, where), layer.weights.to(DEVICE),
        *slots.weights(), path=path,
    )  # fmt: skip


def check(layer: Layer, path: str | None) -> None:
    found, expected, size = compute(layer, path), layer.expected(), layer.size()
    assert error(found, expected, size) <= TOLERANCE[layer.dtype], layer
    assert row_error(found, expected, size) <= ROW_TOLERANCE[layer.dtype], layer


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(path: str, T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(T, 2, 5, 80, 48, dtype), path)


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("function,activation", GATE_ROWS)
def test_gates(
    path: str, T: int, function: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    # Values large enough for a limit of 3 to matter.
    form = {"function": function, "activation": activation, "limit": 3.0}
    check(Layer(T, 2, 3, 40, 24, scale=4.0, bias=True, **form), path)


@pytest.mark.parametrize("path,T", PATHS[1:])
@pytest.mark.parametrize("function,activation", GATE_ROWS)
def test_nan_reaches_the_token_it_belongs_to_and_no_other(
    path: str, T: int, function: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    layer = Layer(T, 2, 3, 40, 24, function=function, activation=activation, limit=3.0)
    clean = compute(layer, path)
    layer.hidden[1, 39] = torch.nan
    found = compute(layer, path)
    layer.hidden[1, 39], layer.weights[1, 0] = 0.0, torch.nan
    weighted = compute(layer, path)
    others = [t for t in range(T) if t != 1]
    for one in (found, weighted):
        assert one[1].isnan().all()
        assert torch.equal(one[others], clean[others])


WEIGHT_FORMS = [
    {"function": "plain", "activation": "relu2"},
    {"function": "plain", "bias": True, "transposed": True},
    {"interleaved": True},
    {"transposed": True},
    {"bias": True},
    {"interleaved": True, "transposed": True, "bias": True},
]


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("form", WEIGHT_FORMS, ids=str)
def test_weight_forms(
    path: str, T: int, form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks.use(monkeypatch)
    check(Layer(T, 3, 4, 70, 33, **form), path)


@pytest.mark.parametrize("draws", range(6))
def test_random_forms(draws: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any gate with any layout, dtype and path."""
    small_blocks.use(monkeypatch)
    draw = random.Random(seed + draws)
    for path, T in PATHS:
        function, activation = draw.choice(GATE_ROWS)
        layer = Layer(
            T, draw.randint(1, 3), 4, draw.randint(1, 150), draw.randint(1, 80),
            draw.choice(DTYPES), draw.randrange(1000), function, activation,
            interleaved=function != "plain" and draw.random() < 0.5,
            transposed=draw.random() < 0.5, bias=draw.random() < 0.5,
            alpha=draw.choice((1.0, 1.702, 4.0)), limit=draw.choice((0.5, 7.0)),
        )  # fmt: skip
        check(layer, path)


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


@pytest.mark.parametrize(
    "path,T,H,I",
    [
        ("vector", 1, 300, 24), ("vector", 1, 20, 290), ("vector", 3, 40, 24),
        ("shared", 5, 150, 20), ("shared", 5, 18, 290), ("grouped", 17, 130, 70),
        ("grouped", 36, 66, 66),
    ],
)  # fmt: skip
def test_committed_block_sizes(path: str, T: int, H: int, I: int) -> None:  # noqa: E741
    """Two blocks along each summed dimension, the second not full; a full tile of prefill rows."""
    full = Layer(T, 2, 3, H, I, torch.bfloat16)
    if path == "grouped":
        full.ids[:] = torch.tensor([0, 2])
    check(full, path)


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
    fused_experts(
        wide[:, :40], slot_ids(layer.ids, where).int(), layer.weights.half().to(DEVICE),
        *slots.weights(), out=out[:, 8:48], path=path,
    )  # fmt: skip
    assert error(out[:, 8:48], layer.expected()) <= TOLERANCE[torch.float16]
    assert (out[:, :8] == 3).all() and (out[:, 48:] == 3).all()


@pytest.mark.parametrize("path,T", PATHS)
def test_the_form_of_vllm(path: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert ids with an expert_map [E] -> local id or -1 give the bits of the slot ids."""
    small_blocks.use(monkeypatch)
    layer = Layer(T, 3, 6, 48, 20)
    slots, where = resident(layer)
    where[int(layer.ids[0, 0])] = -1
    hidden, weights = layer.hidden.to(DEVICE), layer.weights.to(DEVICE)
    options = {"path": path, "num_experts": 6}
    mapped = fused_experts(
        hidden, layer.ids.int().to(DEVICE), weights, *slots.weights(), expert_map=where.int(),
        **options,
    )  # fmt: skip
    direct = fused_experts(hidden, slot_ids(layer.ids, where), weights, *slots.weights(), **options)
    assert torch.equal(mapped, direct)
    absent = torch.where(layer.ids == layer.ids[0, 0], -1, layer.ids)
    assert error(mapped, layer.expected(absent)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("path,T", PATHS)
def test_any_strides(path: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no dimension of a matrix is contiguous, and where up has other strides than gate;
    what lies between is NaN."""
    small_blocks.use(monkeypatch)
    layer = Layer(T, 2, 3, 40, 24, bias=True)
    slots, where = resident(layer)
    call = (layer.hidden.to(DEVICE), slot_ids(layer.ids, where), layer.weights.to(DEVICE))
    matrices, form = slots.weights()

    def spread(tensor: torch.Tensor, step: int = 2) -> torch.Tensor:
        wide = torch.full([step * n for n in tensor.shape], torch.nan, device=DEVICE)
        view = wide[tuple(slice(1, None, step) for _ in tensor.shape)]
        return view.copy_(tensor)

    for up_step in (2, 3):
        gate, up, down = (
            Matrix(spread(matrix.values, step), None, spread(matrix.bias), matrix.format)
            for matrix, step in (
                (matrices.gate, 2), (matrices.up, up_step), (matrices.down, 2),
            )
        )  # fmt: skip
        found = fused_experts(*call, ExpertMatrices(gate, up, down), form, path=path)
        assert error(found, layer.expected()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("path,T", PATHS)
def test_weights_that_move_are_found(path: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ExpertMatrices after its tensors were given other memory, as `module.to` does."""
    small_blocks.use(monkeypatch)
    layer = Layer(T, 2, 3, 40, 24)
    slots, where = resident(layer)
    matrices, form = slots.weights()
    call = (layer.hidden.to(DEVICE), slot_ids(layer.ids, where), layer.weights.to(DEVICE))
    first = fused_experts(*call, matrices, form, path=path)
    for tensor in filter(lambda t: t is not None, matrices.tensors):
        moved = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=DEVICE)[3:]
        tensor.data = moved.view(tensor.shape).copy_(tensor)
    slots.arena.fill_(torch.nan)
    assert torch.equal(fused_experts(*call, matrices, form, path=path), first)

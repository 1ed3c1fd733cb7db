"""The torch fallback computes every form and format; the reference goes number by number."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from scaled_weights import EVERY, random_experts, whole

from moeinf.checkpoint.formats import PLAIN_FORMATS
from moeinf.checkpoint.layout import Layout
from moeinf.experts import torch_products
from moeinf.kernels.forms import ExpertForm, Gate

H, I, E, T, K = 7, 5, 4, 3, 2  # noqa: E741


def gate_value(function: str, g: float, u: float) -> float:
    """The two functions of the test: with every constant, and without up."""
    if function == "plain":
        return max(g, 0.0) ** 2
    g, u = min(g, 0.9), min(max(u, -0.9), 0.9)
    return (u + 1) * g / (1 + math.exp(-1.7 * g))


@pytest.mark.parametrize("format_", PLAIN_FORMATS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("function", ["swiglu_oai", "plain"])
def test_routes_are_down_of_the_gate_of_gate_and_up(format_, has_bias, interleaved, function):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = torch.Generator().manual_seed(seed)
    gate = Gate(function, "relu2" if function == "plain" else "silu", 1.7, 0.9)
    form = ExpertForm(gate, function != "plain", has_bias)
    layout = Layout.of(form, format_, H, I, interleaved=interleaved)
    pool = torch.full((E, layout.slot_bytes), 255, dtype=torch.uint8)  # NaN in every format
    for view in layout.views(pool).values():
        view[1:].copy_(torch.randn(view[1:].shape, generator=rng))
    x = torch.randn(T, H, generator=rng)
    ids = torch.tensor([[0, 2], [2, -1], [1, 0]])
    slots = torch.tensor([3, -1, 1, -1])  # expert 1 is not here; nobody asks for expert 3
    routes = torch.full((T, K, H), math.nan)
    matrices = layout.matrices(pool)
    torch_products.expert_routes(x, ids, matrices, form, expert_map=slots, routes=routes)

    def apply(name: str, slot: int, row: int, values: list[float]) -> float:
        matrix = getattr(matrices, name)
        bias = 0.0 if matrix.bias is None else float(matrix.bias[slot, row])
        return bias + sum(float(w) * v for w, v in zip(matrix.values[slot, row], values))  # noqa: B905

    for t, j in itertools.product(range(T), range(K)):
        expert = int(ids[t, j])
        if expert in (-1, 1):
            assert routes[t, j].isnan().all()
            continue
        slot, token = int(slots[expert]), x[t].tolist()
        inner = [
            gate_value(
                function,
                apply("gate", slot, i, token),
                apply("up", slot, i, token) if form.has_gate else 0.0,
            )
            for i in range(I)
        ]
        expected = [apply("down", slot, h, inner) for h in range(H)]
        assert torch.allclose(routes[t, j].double(), torch.tensor(expected).double(), atol=2e-5)


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_weights_with_scales(row):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    experts = random_experts(row, whole(row, 70), whole(row, 34), 3, seed)
    x = torch.randn(5, whole(row, 70), generator=torch.Generator().manual_seed(seed))
    ids, weights = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [1, 1]]), torch.ones(5, 2)
    routes = torch_products.expert_routes(
        x, ids, experts.layout.matrices(experts.pool), experts.form, expert_map=torch.arange(3)
    )
    found = torch_products.combine(routes, ids, weights, dtype=torch.float32)
    expected, size = experts.expected(x, ids, weights)
    assert float((found.double() - expected).abs().max() / size.max()) < 1e-5

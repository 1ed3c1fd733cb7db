"""What decode kernels read and write, counted load by load: every active weight once, no other.

The formula that `benchmarks.kernel_evidence` evaluates at real sizes is held to these counts.
"""

from __future__ import annotations

import random

import pytest
import torch
from layers import DEVICE

from benchmarks import kernel_bytes
from benchmarks.kernel_bytes import Step, configs, counted, differences, traffic

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="loads are counted in the interpreter")


def reads(path: str, step: Step, **options: object) -> dict[str, torch.Tensor]:
    """[slots, elements of a slot] how often each weight was read, for gate, up and down."""
    launches, out = counted(path, step, **options)
    assert torch.isfinite(out).all(), "a slot that holds NaN was used"
    slots = max(slot for row in step.slots for slot in row) + 3
    return {
        name: torch.from_numpy(times).reshape(slots, -1)
        for one in launches
        for name, times in one.times.items()
    }


def check(path: str, step: Step, expected: dict[int, int], **options: object) -> None:
    """Every weight of a slot is read as often as `expected` says; of other slots, never."""
    for name, times in reads(path, step, **options).items():
        for slot, row in enumerate(times):
            want = expected.get(slot, 0)
            assert (row == want).all(), (name, slot, want, row.unique())


@pytest.mark.parametrize("form", [{}, {"interleaved": True}, {"transposed": True}], ids=str)
def test_one_token_reads_each_active_weight_once_and_nothing_else(
    form: dict[str, object], seed: int
) -> None:
    draw = random.Random(seed)
    k = draw.randint(1, 6)
    slots = draw.sample(range(9), k)
    slots[draw.randrange(k)] = slots[0] if k == 1 else -1
    step = Step((tuple(slots),), draw.randint(1, 300), draw.randint(1, 40))
    check("vector", step, {slot: 1 for slot in slots if slot >= 0}, **form)


@pytest.mark.parametrize("form", [{}, {"interleaved": True}, {"transposed": True}], ids=str)
def test_tokens_that_share_an_expert_read_it_together(form: dict[str, object], seed: int) -> None:
    draw = random.Random(seed)
    rows = tuple(tuple(draw.randrange(-1, 5) for _ in range(3)) for _ in range(draw.randint(2, 16)))
    step = Step(rows, draw.randint(1, 150), draw.randint(1, 80))
    check("shared", step, {slot: 1 for row in rows for slot in row if slot >= 0}, **form)


def test_without_tensor_cores_an_expert_is_read_once_per_route() -> None:
    step = Step(((0, 3), (3, 1), (3, -1)), 40, 20, weight_size=4)
    check("vector", step, {0: 1, 1: 1, 3: 3})


@pytest.mark.parametrize("path,step,options", kernel_bytes.SMALL)
def test_the_formula_is_what_was_counted(path: str, step: Step, options: dict[str, object]) -> None:
    order = "columns" if options.get("transposed") else "rows"
    launches, _ = counted(path, step, **options)
    assert not differences(launches, traffic(path, step, *configs(path, step, order)))


def test_a_second_read_would_be_counted() -> None:
    """The meter itself: two steps under one meter, and the same weights are read twice."""
    from moeinf.kernels import ExpertForm, ExpertMatrices, Matrix, fused_experts

    with kernel_bytes.Meter() as meter:
        hidden, ids, weights = (
            torch.ones(1, 8),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.ones(1, 2),
        )
        gate, up, down = (
            Matrix(torch.ones(shape), format="f32") for shape in ((2, 4, 8), (2, 4, 8), (2, 8, 4))
        )
        matrices = ExpertMatrices(gate, up, down)
        fused_experts(hidden, ids, weights, matrices, ExpertForm())
    for one in meter.launches:
        for times in one.times.values():
            half = times.size // 2
            assert (times[:half] == 2).all() and (times[half:] == 0).all()

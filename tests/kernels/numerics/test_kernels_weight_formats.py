"""Weights with scales in every kernel: all values, all scales, and the float64 answer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import small_blocks
import torch
import triton
import triton.language as tl
from layers import DEVICE, ROW_TOLERANCE, TOLERANCE, error, row_error

sys.path.append(str(Path(__file__).parents[2]))
from scaled_weights import EVERY, MIXED, PALETTES, every_code, random_experts, whole

from moeinf.checkpoint.formats import FORMATS, WeightFormat
from moeinf.checkpoint.layout import Formats, Layout, format_of_each
from moeinf.kernels import ExpertForm, Gate, blocks, formats, fused_experts, launch_plan, paths


@triton.jit
def multiply_widened(a, b, acc, UPCAST: tl.constexpr):
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


def use_blocks(patch: pytest.MonkeyPatch, row: Formats) -> None:
    """Tiles that are smaller than the matrices, and few: the interpreter is slow."""
    if whole(row, 1) == 256:
        small_blocks.use(patch, BLOCK_H=128, BLOCK_I=128)
    else:
        small_blocks.use(patch)


PATHS = (("vector", 1), ("vector", 3), ("shared", 5), ("grouped", 19))


@pytest.mark.parametrize("path,T", PATHS)
@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_matches_the_float64_reference(
    row: WeightFormat, path: str, T: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, row)
    draw = random.Random(seed)
    for dtype in (torch.bfloat16, draw.choice((torch.float16, torch.float32))):
        compare(row, path, T, dtype, draw)


def compare(row: Formats, path: str, T: int, dtype: torch.dtype, draw: random.Random) -> None:
    H = whole(row, 2 * draw.choice((32, 35, 88)))
    I = whole(row, 2 * draw.choice((16, 33, 56)))  # noqa: E741
    seed = draw.randrange(2**31)
    experts = random_experts(row, H, I, 3, seed)
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=rng).to(dtype)
    ids, weights = torch.randint(0, 3, (T, 2), generator=rng), torch.rand(T, 2, generator=rng)
    found = fused_experts(
        hidden.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE),
        experts.layout.matrices(experts.pool.to(DEVICE)), experts.form, path=path,
    )  # fmt: skip
    expected, _ = experts.expected(hidden, ids, weights)
    assert error(found, expected) <= TOLERANCE[dtype], (dtype, H, I)
    # Random bytes have a few large values, whose rounding is measured against all of a row.
    assert row_error(found, expected) <= 3 * ROW_TOLERANCE[dtype], (dtype, H, I)


def use_tensor_cores(patch: pytest.MonkeyPatch) -> None:
    """Tiles of bf16, as for tensor cores. The interpreter, which multiplies floats alone, is given
    their widened product."""
    if DEVICE == "cpu":
        patch.setattr(paths, "must_upcast", lambda *_: False)
        for module in (formats, blocks):
            patch.setattr(module, "multiply", multiply_widened)


@pytest.mark.parametrize("path,T", [("vector", 1), *PATHS[2:]])
def test_palettes_match_the_float64_reference(
    path: str, T: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of the table in one expert; the loop over rare weights is the same for each."""
    draw = random.Random(seed)
    row = tuple(draw.sample([*PALETTES.values()], 3))
    use_blocks(monkeypatch, row)
    compare(row, path, T, torch.bfloat16, draw)
    compare(row, path, T, draw.choice((torch.float16, torch.float32)), draw)


@pytest.mark.parametrize("path,T", PATHS[1:])
@pytest.mark.parametrize("name", MIXED)
def test_gate_and_up_of_two_formats(
    name: str, path: str, T: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on tensor cores, where each has tiles of its own."""
    row, draw = MIXED[name], random.Random(seed)
    use_blocks(monkeypatch, row)
    if all(torch.float32 in formats.FORMATS[one.name].tokens for one in format_of_each(row)):
        compare(row, path, T, draw.choice((torch.float16, torch.float32)), draw)
    use_tensor_cores(monkeypatch)
    launch_plan.PLANS.clear()
    compare(row, path, T, torch.bfloat16, draw)


CODES = EVERY | {"palette7": FORMATS["palette7"]}


@pytest.mark.parametrize("path,T", [("vector", 8), ("shared", 16), ("grouped", 48)])
@pytest.mark.parametrize(
    "row,as_on_a_gpu",
    [(row, as_on_a_gpu) for as_on_a_gpu in (False, True) for row in CODES.values()],
    ids=[*CODES, *(f"{name}-as-on-a-gpu" for name in CODES)],
)
def test_every_value_and_every_scale_is_exact(
    row: WeightFormat,
    path: str,
    T: int,
    as_on_a_gpu: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token k is 1 at k and 0 elsewhere, and passes to down unchanged: its output is column k."""
    use_blocks(monkeypatch, row)
    if as_on_a_gpu:
        use_tensor_cores(monkeypatch)
    rows, cols = 80, whole(row, 96)
    parts = every_code(row, rows, cols, seed)
    form = ExpertForm(Gate("plain", "relu"), has_gate=False)
    dtype = torch.bfloat16 if as_on_a_gpu else torch.float32
    gate = FORMATS["bf16" if as_on_a_gpu else "f32"]
    layout = Layout.of(form, (gate, row), rows, cols)
    pool = torch.full((1, layout.slot_bytes), 255, dtype=torch.uint8, device=DEVICE)
    views = layout.matrices(pool)
    for piece, tensor in parts.items():
        getattr(views.down, piece)[0] = tensor if piece != "multiplier" else tensor[0]
    zeros = torch.zeros(T, 1, dtype=torch.int64, device=DEVICE)
    for first in (0, cols - T):
        count = min(T, rows, cols - first)
        views.gate.values.zero_()
        views.gate.values[0, first : first + count, :count] = torch.eye(count)
        hidden = torch.zeros(T, rows, dtype=dtype, device=DEVICE)
        hidden[:count, :count] = torch.eye(count)
        found = fused_experts(
            hidden, zeros, torch.ones(T, 1, device=DEVICE), views, form, path=path
        )
        wanted = row.dequantise(parts)[:, first : first + count].T.float().double()
        # The output has the dtype of the tokens; a multiplier meets a number rounded before.
        near = 2**-8 if as_on_a_gpu else 2**-22 if row.multiplier else 0
        # The interpreter makes 0 of subnormal floats when it converts them to bf16.
        least = 2**-126 if as_on_a_gpu else 2**-133
        torch.testing.assert_close(found[:count].double().cpu(), wanted, rtol=near, atol=least)

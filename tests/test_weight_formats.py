"""Weights with scales on the CPU: every format, every instruction set, one token to many."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scaled_weights import EVERY, MIXED, Experts, every_code, random_experts, whole

from moeinf import _core
from moeinf.checkpoint.formats import FORMATS, VALUES, WeightFormat
from moeinf.checkpoint.layout import Formats, Layout
from moeinf.experts.checks import DTYPES
from moeinf.experts.cpu import core_expert
from moeinf.kernels.forms import ExpertForm, Gate

# Scales of 16 columns, which only NVFP4 has in a checkpoint, and with zero points.
ROWS = {
    **EVERY,
    "int4-16-zeros": FORMATS["int4"].with_scales("f16", (1, 16), zeros=True),
    "fp8-16x384": FORMATS["e4m3"].with_scales("bf16", (16, 384)),
}
ISAS = [name for name, supported in _core.cpu_kernels() if supported]
# Largest error over the largest sum of absolute terms. bf16 tokens may round the values between the
# two products to bf16, as with weights in bf16; all else is float32 throughout.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 1e-5, torch.float32: 1e-5}


@pytest.fixture(scope="module", params=ISAS)
def engine(request: pytest.FixtureRequest) -> _core.CpuEngine:
    return _core.CpuEngine(threads=2, kernels=request.param)


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


def core_input(hidden, ids, weights, experts, whole_tokens=0):
    return _core.FfnInput(
        hidden=hidden.data_ptr(), hidden_dtype=DTYPES[hidden.dtype], topk_ids=ids.data_ptr(),
        ids_are_int64=True, topk_weights=weights.data_ptr(), topk_weights_dtype=_core.DType.f32,
        tokens=len(hidden), top_k=ids.shape[1], num_experts=experts, whole_tokens=whole_tokens,
    )  # fmt: skip


def run(engine, experts: Experts, *call, waves: bool = False, whole_tokens: int = 0):
    """float32 [T, H]; `waves`: one expert after another, the last first."""
    hidden = call[0]
    expert = core_expert(experts.form, experts.layout)
    inputs = core_input(*call, len(experts.pool), whole_tokens)
    call = _core.ExpertFfnCall(engine, expert, inputs)
    ready = [(p, experts.pool[e].data_ptr()) for p, e in enumerate(call.experts)]
    for wave in [[one] for one in reversed(ready)] if waves else [ready]:
        call.compute(wave)
    out = torch.full(hidden.shape, math.nan)
    call.finish(out.data_ptr(), _core.DType.f32)
    return out


def random_call(seed: int, tokens: int, hidden: int, experts: int, dtype: torch.dtype):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=rng).to(dtype),
        torch.randint(0, experts, (tokens, 2), generator=rng),
        torch.rand(tokens, 2, generator=rng),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_value_and_every_scale_is_exact(engine, seed, row: WeightFormat, dtype):
    """Token k is 1 at k and 0 elsewhere, and passes to down unchanged: y[k] is column k of down.

    Also subnormal values and scales. A multiplier is applied to a number that was rounded before.
    """
    rows, cols = 80, whole(row, 176)
    parts = every_code(row, rows, cols, seed)
    form = ExpertForm(Gate("plain", "relu"), has_gate=False)
    plain = FORMATS["bf16" if dtype == torch.bfloat16 else "f32"]
    layout = Layout.of(form, (plain, row), rows, cols)
    pool = torch.full((1, layout.slot_bytes), 255, dtype=torch.uint8)
    views = layout.matrices(pool)
    for piece, tensor in parts.items():
        getattr(views.down, piece)[0] = tensor if piece != "multiplier" else tensor[0]
    for first in range(0, cols, rows):  # gate passes `rows` of the columns at a time
        count = min(rows, cols - first)
        views.gate.values.zero_()
        views.gate.values[0, first : first + count, :count] = torch.eye(count)
        hidden = torch.zeros(count, rows, dtype=dtype)
        hidden[:, :count] = torch.eye(count)
        found = run(
            engine, Experts(layout, form, pool, []), hidden,
            torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, 1),
        )  # fmt: skip
        wanted = row.dequantise(parts)[:, first : first + count].T
        if row.multiplier:
            torch.testing.assert_close(found.double(), wanted, rtol=2**-22, atol=0)
        else:
            assert torch.equal(found, wanted.float())


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_some_rows_at_a_time_are_the_whole(seed, row: WeightFormat, monkeypatch):
    rng = random.Random(seed)
    rows, cols = rng.randint(1, 300), whole(row, 2 * rng.randint(8, 200))
    parts = every_code(row, rows, cols, seed)
    stored = parts["values"].shape[1]
    for panel in (1, rng.randint(1, 300 * stored), 70 * stored, 2**18):
        monkeypatch.setattr("moeinf.checkpoint.formats.PANEL", panel)
        found = torch.full((rows, cols), torch.nan, dtype=torch.float64)
        for first, numbers in row.dequantise_panels(parts):
            found[first : first + len(numbers)] = numbers
        assert torch.equal(found, row.dequantise(parts)), (rows, cols, panel)


@pytest.mark.parametrize("formats", [*ROWS.values(), *MIXED.values()], ids=[*ROWS, *MIXED])
def test_matches_the_float64_reference(engine, seed, formats: Formats):
    rng = random.Random(seed)
    for dtype, tokens in ((d, t) for d in DTYPES for t in (1, rng.choice([2, 3, 4, 7]), 40)):
        hidden = whole(formats, 2 * rng.choice([32, 35, 352, rng.randint(8, 300)]))
        intermediate = whole(formats, 2 * rng.choice([8, 33, 352, rng.randint(8, 200)]))
        experts = random_experts(formats, hidden, intermediate, 3, rng.randrange(2**31))
        call = random_call(seed, tokens, hidden, 3, dtype)
        found, (expected, size) = run(engine, experts, *call), experts.expected(*call)
        error = float((found.double() - expected).abs().max() / size.max())
        assert error <= TOLERANCE[dtype], (dtype, tokens, hidden, intermediate)


@pytest.mark.parametrize("formats", [*ROWS.values(), *MIXED.values()], ids=[*ROWS, *MIXED])
def test_bits_do_not_depend_on_company_waves_or_threads(engine, seed, formats: Formats):
    """A token's bits are the same in a part of a call of 45, and alone as among seven; for weights
    decoded once and many times."""
    experts = random_experts(formats, whole(formats, 352), whole(formats, 224), 2, seed)
    hidden, ids, weights = random_call(seed, 45, experts.layout.hidden, 2, torch.bfloat16)
    together = run(engine, experts, hidden, ids, weights)
    assert torch.equal(run(engine, experts, hidden, ids, weights, waves=True), together)
    single = _core.CpuEngine(threads=1, kernels=engine.kernels)

    def part(first: int, last: int, whole_tokens: int = 0) -> torch.Tensor:
        some = [each[first:last].clone() for each in (hidden, ids, weights)]
        return run(single, experts, *some, whole_tokens=whole_tokens)

    for t in (0, 7, 44):
        assert torch.equal(part(t, t + 1, whole_tokens=45)[0], together[t])
    few = part(20, 27)
    for t in (20, 26):
        assert torch.equal(part(t, t + 1)[0], few[t - 20])


@pytest.mark.parametrize("name", ["mxfp4", "fp8-channel", "nvfp4"])
def test_interleaved_rows_and_biases(engine, seed, name):
    """GPT-OSS: rows of gate and up alternate, each matrix has a bias."""
    form = ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True)
    experts = random_experts(EVERY[name], 352, 96, 3, seed, form, interleaved=True)
    for tokens in (1, 30):
        call = random_call(seed, tokens, 352, 3, torch.float32)
        found, (expected, size) = run(engine, experts, *call), experts.expected(*call)
        assert float((found.double() - expected).abs().max() / size.max()) <= 1e-5


def number(row: WeightFormat, code: int) -> float:
    """What a stored value stands for, from the definition of its format."""
    if row.name == "int4":
        return code - 8
    if row.name == "int8":
        return code - 256 if code >= 128 else code
    mantissa_bits, bias = (1, 1) if row.name == "e2m1" else (3, 7)
    bits = 4 if row.name == "e2m1" else 8
    sign = -1.0 if code >> (bits - 1) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << (bits - 1 - mantissa_bits)) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if row.unit == 1])
def test_dequantise_is_the_definition_of_the_format(seed, name: str):
    row = EVERY[name]
    rows, cols = 37, 70
    parts = every_code(row, rows, cols, seed)
    found = row.dequantise(parts)
    stored = parts[VALUES].view(torch.uint8)
    for n in range(rows):
        for k in range(cols):
            byte = int(stored[n, k // row.pack])
            expected = number(row, byte if row.pack == 1 else (byte >> 4 * (k % 2)) & 15)
            if row.block is not None:
                place = n // row.block[0], k // row.block[1] if row.block[1] else 0
                if row.zeros:
                    expected -= int(parts["zeros"][place])
                scale = parts["scales"][place]
                exponent = scale.dtype == torch.uint8
                expected *= 2.0 ** (int(scale) - 127) if exponent else float(scale)
            if row.multiplier:
                expected *= float(parts["multiplier"])
            assert float(found[n, k]) == expected


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((1, 48), "expected blocks of 1 row or more, and of all columns, of 8, 16, 32, 64"),
        ((0, 32), "got 0 x 32"),
        ((1, 4), "got 1 x 4"),
    ],
)
def test_blocks_that_no_product_takes_are_refused(scales, message):
    def matrix(rows: int, cols: int) -> _core.Matrix:
        return _core.Matrix(
            format="e4m3", rows=rows, cols=cols, values=_core.Rows(0, cols),
            scales=_core.Scales(_core.Rows(8192, 64), _core.ScaleType.f32, *scales),
        )  # fmt: skip

    with pytest.raises(ValueError, match=message):
        _core.ExpertFfn(gate=matrix(64, 96), up=matrix(64, 96), down=matrix(96, 64),
                        function=_core.Gate("glu", "silu"))  # fmt: skip


FAR = {name: row for name, row in EVERY.items() if row.scales == "e8m0" or row.name == "mxfp4"}


@pytest.mark.parametrize("row", FAR.values(), ids=FAR)
@pytest.mark.parametrize("kernels", ISAS)
def test_scales_far_apart_have_the_same_bits_however_work_is_cut(seed, row: WeightFormat, kernels):
    """A matrix unit decodes panels with such scales in another way than others."""
    rng = random.Random(seed)
    hidden, intermediate = whole(row, 32 * rng.randint(2, 24)), whole(row, 32 * rng.randint(2, 16))
    experts = random_experts(row, hidden, intermediate, 3, rng.randrange(2**31))
    draw = torch.Generator().manual_seed(seed)
    for name, view in experts.layout.views(experts.pool).items():
        piece = name.rpartition(".")[2]
        scales = view if piece == "scales" else view[..., :: row.unit]
        if piece == "scales" or (piece == "values" and row.unit > 1):
            far = torch.rand(scales.shape, generator=draw) < 0.002
            scales[far] = torch.randint(0, 60, scales.shape, generator=draw).to(torch.uint8)[far]
    call = random_call(seed, 150, hidden, 3, torch.bfloat16)
    wanted = None
    for threads, waves in ((1, False), (2, False), (3, False), (2, True)):
        engine = _core.CpuEngine(threads=threads, kernels=kernels)
        found = run(engine, experts, *call, waves=waves)
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted), (threads, waves, hidden, intermediate)

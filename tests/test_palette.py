"""bf16 weights in 12 bits: no bit is lost, no product changes, malformed rows are refused."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from scaled_weights import Experts
from test_weight_formats import ISAS, random_call, run

import moeinf
from moeinf import _core
from moeinf.checkpoint import palette
from moeinf.checkpoint.formats import FORMATS, VALUES, WeightFormat
from moeinf.checkpoint.layout import Layout, lay_out_matrix
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import ReadError
from moeinf.experts.checks import DTYPES
from moeinf.experts.cpu import core_matrix
from moeinf.kernels.forms import ExpertForm, Gate

ROWS = [FORMATS[f"palette{rare}"] for rare in palette.RARE]
BF16 = FORMATS["bf16"]


@pytest.fixture(scope="module", params=ISAS)
def engine(request: pytest.FixtureRequest) -> _core.CpuEngine:
    return _core.CpuEngine(threads=2, kernels=request.param)


def rare_of(row: WeightFormat) -> int:
    return int(row.name.removeprefix("palette"))


def bits_of(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(torch.int16)


def random_weights(rows: int, cols: int, rare: int, seed: int, *, finite: bool = True):
    """bf16 [rows, cols]: at most `rare` weights of a row lie outside of 15 exponents."""
    rng = torch.Generator().manual_seed(seed)
    lowest = torch.randint(0, 238, (rows, 1), generator=rng)
    exponents = lowest + torch.randint(0, 15, (rows, cols), generator=rng)
    if finite:
        exponents = (exponents - lowest) + torch.randint(108, 112, (rows, 1), generator=rng)
    weights = exponents << 7 | torch.randint(0, 128, (rows, cols), generator=rng)
    weights |= torch.randint(0, 2, (rows, cols), generator=rng) << 15
    zeros = torch.rand(rows, cols, generator=rng) < 0.1
    weights[zeros] &= 1 << 15
    others = [0x0001, 0x8055, 0x007F, 0x3F80, 0xC110, 0x0080, 0x2000]
    others += [] if finite else [0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F7F]
    places = torch.randint(0, cols, (rows, rare), generator=rng)
    drawn = torch.tensor(others)[torch.randint(0, len(others), places.shape, generator=rng)]
    some = torch.rand(places.shape, generator=rng) < 0.5
    weights.scatter_(1, places, torch.where(some, drawn, weights.gather(1, places)))
    return palette.as_bf16(weights)


def stored(row: WeightFormat, weights: torch.Tensor) -> torch.Tensor:
    if row is BF16:
        return weights
    base, rare = palette.bases(weights)
    assert int(rare.max()) <= rare_of(row)
    return palette.encode(weights, base, rare_of(row))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_bit_is_lost(seed, row):
    rng = random.Random(seed)
    for cols in (64, 64 * rng.randint(2, 20)):
        weights = random_weights(rng.randint(1, 60), cols, rare_of(row), seed, finite=False)
        packed = stored(row, weights)
        ((dtype, shape),) = row.segments(*weights.shape).values()
        assert (packed.dtype, tuple(packed.shape)) == (dtype, shape)
        assert row.cols(shape[1]) == cols
        row.refuse({VALUES: packed}, "w")
        assert torch.equal(bits_of(palette.as_bf16(palette.bits_of(packed, row.tail))),
                           bits_of(weights))  # fmt: skip
        assert torch.equal(row.decode(packed).nan_to_num(7.0), weights.double().nan_to_num(7.0))


def test_the_base_leaves_the_fewest_rare_weights(seed):
    rng = torch.Generator().manual_seed(seed)
    exponents = torch.randint(0, 256, (50, 128), generator=rng)
    exponents[::2] = 100 + exponents[::2] % 40
    weights = palette.as_bf16(exponents << 7 | torch.randint(0, 128, (50, 128), generator=rng))
    base, rare = palette.bases(weights)
    for n in range(50):
        there = [int(e) for e, w in zip(exponents[n], weights[n], strict=True) if w != 0]
        outside = [sum(not b <= e < b + 15 for e in there) for b in range(241)]
        assert int(rare[n]) == min(outside) == outside[int(base[n])]


def test_a_block_lies_where_the_format_says():
    """The layout by hand: base 120; columns 0 and 33 of exponents 120 and 134, a rare one."""
    weights = torch.zeros(1, 64, dtype=torch.bfloat16)
    weights[0, 0], weights[0, 1], weights[0, 33], weights[0, 63] = 2.0**-7, -0.0, -1.5 * 2**7, 1e9
    base, rare = palette.bases(weights)
    assert (int(base), int(rare)) == (120, 1)
    row = palette.encode(weights, base, 3)[0].tolist()
    codes, rest, tail = row[:32], row[32:96], row[96:]
    assert codes == [0xF0, 0xEF, *[0xFF] * 30]
    assert rest == [0, 0x80, *[0] * 31, 0x80 | 64, *[0] * 30]
    bits = int(weights[0, 63].view(torch.int16))
    assert tail == [120, 0, 0, 0, bits & 255, bits >> 8, 63, 0, *[0] * 8]


@pytest.mark.parametrize("long", [False, True], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_have_the_bits_of_bf16(engine, seed, dtype, long):
    rng = random.Random(seed)
    for _ in range(1 if long else 3):
        gate, up, down = (rng.choice([*ROWS, BF16]) for _ in range(3))
        interleaved = rng.random() < 0.4
        if rng.random() < 0.5 or interleaved:
            up = gate
        form = ExpertForm(Gate("glu"), has_bias=rng.random() < 0.3)
        hidden, intermediate = 64 * rng.randint(1, 5), 64 * rng.randint(1, 4)
        packed, plain = (
            Layout.of(form, formats, hidden, intermediate, interleaved=interleaved)
            for formats in ((gate, up, down), BF16)
        )
        pools = [torch.full((2, one.slot_bytes), 255, dtype=torch.uint8) for one in (packed, plain)]
        formats = packed.named
        views, wanted = packed.matrices(pools[0]), plain.matrices(pools[1])
        for name, matrix in formats.items():
            rare = 15 if matrix.format is BF16 else rare_of(matrix.format)
            for e in range(2):
                weights = random_weights(matrix.rows, matrix.cols, rare, rng.randrange(2**31))
                getattr(wanted, name).values[e] = weights
                getattr(views, name).values[e] = stored(matrix.format, weights)
            if form.has_bias:
                bias = torch.randn(2, matrix.rows).bfloat16()
                for one in (wanted, views):
                    getattr(one, name).bias.copy_(bias)
        for tokens in (rng.randint(60, 300),) if long else (1, rng.randint(2, 30)):
            call = random_call(rng.randrange(2**31), tokens, hidden, 2, dtype)
            found = run(engine, Experts(packed, form, pools[0], []), *call)
            expected = run(engine, Experts(plain, form, pools[1], []), *call)
            assert expected.isfinite().all()
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), (
                tokens, hidden, intermediate, [m.format.name for m in formats.values()],
            )  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_linear_layer_and_its_numbers_have_the_bits_of_bf16(engine, seed, row):
    """Also where weights are infinite or NaN, and for the widest matrix."""
    rng = random.Random(seed)
    for rows, cols in ((rng.randint(1, 40), 64 * rng.randint(1, 30)), (2, 1 << 16)):
        weights = random_weights(rows, cols, rare_of(row), seed, finite=False)
        made = []
        for one in (row, BF16):
            nbytes, matrix = lay_out_matrix(one, rows, cols)
            memory = torch.full((1, nbytes), 255, dtype=torch.uint8)
            matrix.view(memory).values[0] = stored(one, weights)
            made.append((_core.LinearWeight(core_matrix(matrix)), memory))
        for dtype in DTYPES:
            tokens = torch.randn(rng.randint(1, 8), cols).to(dtype)
            both = [
                _core.packed_linear(engine, tokens, weight, memory[0], None, None)
                for weight, memory in made
            ]
            numbers = [torch.full((rows, cols), 7, dtype=dtype) for _ in made]
            for (weight, memory), to in zip(made, numbers, strict=True):
                address = memory.data_ptr()
                _core.decode(engine, DTYPES[dtype], weight, address, 0, rows, to.data_ptr())
            for found, expected in (both, numbers):
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(5.0), expected.nan_to_num(5.0))
            assert torch.equal(numbers[0].signbit(), numbers[1].signbit())


def malformed(row: WeightFormat):
    """What is changed in the last row of two, by name: (byte, value) counted from its end, or from
    its start; and what the message expects. Row: 128 columns, rare weights in 5 and 70."""
    tail = row.tail
    return {
        "base": ([(-tail, 242)], "a base exponent of at most 241"),
        "byte 1": ([(1 - tail, 1)], "three bytes of 0"),
        "byte 3": ([(3 - tail, 128)], "three bytes of 0"),
        "column": ([(4 - tail + 4 + 2, 128)], "rare weights in columns below 128"),
        "far column": ([(4 - tail + 4 + 3, 255)], "rare weights in columns below 128"),
        "falling": ([(4 - tail + 2, 70), (4 - tail + 6, 5)], "rare weights in rising columns"),
        "twice": ([(4 - tail + 2, 70)], "rare weights in rising columns"),
        "gap": ([(4 - tail + i, 0) for i in range(4)], "rare weights in rising columns"),
        "code": ([(5, 0xF3)], "a zero in the place of each rare weight"),
        "upper code": ([(4 - tail + 6, 64 + 38)], "a zero in the place"),
        "byte": ([(32 + 5, 0x80)], "a zero in the place of each rare weight"),
    }


def two_rows(row: WeightFormat) -> torch.Tensor:
    weights = torch.ones(2, 128, dtype=torch.bfloat16)
    weights[:, 5] = 1e20
    weights[:, 70] = -1e-20
    return stored(row, weights)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_malformed_rows_are_refused(row):
    good = two_rows(row)
    row.refuse({VALUES: good}, "w")
    for changes, message in malformed(row).values():
        bad = good.clone()
        for at, value in changes:
            bad[1, at] = value
        with pytest.raises(ReadError, match=f"^w: values, row 1: expected {message}"):
            row.refuse({VALUES: bad}, "w")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_core_refuses_malformed_rows_as_they_are_read(row):
    """Before a kernel can meet them. A good expert beside it is served."""
    good = two_rows(row)
    rows = {"gate_up": good.repeat(128, 1), "down": good.repeat(64, 1)}
    for changes, message in malformed(row).values():
        for name in rows:
            tensors = {one: torch.stack([whole, whole]) for one, whole in rows.items()}
            for at, value in changes:
                tensors[name][1, -1, at] = value
            form = ExpertForm(Gate("glu"))
            store = ExpertStore.from_tensors([tensors], form=form, formats=row)
            message = message.replace("below 128", "of the matrix")
            with pytest.raises(ReadError, match=rf"layer 0: {name}, expert 1.*expected {message}"):
                moeinf.ExpertCache(store, slots=1).acquire(0, [1])
            moeinf.ExpertCache(store, slots=1).acquire(0, [0]).release()


def test_no_kernel_writes_outside_of_a_row(engine, seed):
    """Whatever the bytes are: also those that reading would refuse."""
    rng = random.Random(seed)
    for row in ROWS:
        rows, cols = rng.randint(1, 9), 64 * rng.randint(1, 6)
        nbytes, matrix = lay_out_matrix(row, rows, cols)
        memory = torch.randint(0, 256, (1, nbytes), dtype=torch.uint8)
        weight = _core.LinearWeight(core_matrix(matrix))
        out = torch.full((rows + 2, cols), 7.0)
        _core.decode(engine, DTYPES[out.dtype], weight, memory.data_ptr(), 0, rows,
                     out[1].data_ptr())  # fmt: skip
        assert (out[0] == 7).all() and (out[-1] == 7).all()
        found = _core.packed_linear(engine, torch.ones(1, cols), weight, memory[0], None, None)
        assert found.shape == (1, rows)


def test_more_columns_than_a_tail_can_name_are_refused():
    with pytest.raises(ValueError, match="palette3: expected at most 65536 columns, got 65600"):
        ROWS[0].segments(1, 65600)
    _, matrix = lay_out_matrix(ROWS[0], 1, 128)
    wide = dataclasses.replace(matrix, cols=65600)
    with pytest.raises(ValueError, match="a row of palette3 has at most 65536 columns, got 65600"):
        _core.LinearWeight(core_matrix(wide))

"""What a layout promises: each matrix lies where its bytes were put, in every form and format."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moeinf.checkpoint.formats import FORMATS, PLAIN_FORMATS
from moeinf.checkpoint.layout import Layout
from moeinf.kernels.forms import ExpertForm, Gate, Matrix

BLOCKS = FORMATS["e4m3"].with_scales("f32", (16, 32))
GROUPS = FORMATS["int4"].with_scales("bf16", (1, 8), multiplier=True)
EVERY = {**FORMATS, "blocks": BLOCKS, "groups": GROUPS}


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


@pytest.mark.parametrize("dtype", PLAIN_FORMATS)
def test_bytes_of_plain_experts_lie_where_they_always_lay(dtype):
    layout = Layout.of(ExpertForm(), PLAIN_FORMATS[dtype], hidden=40, intermediate=24)
    size = dtype.itemsize
    found = [(s.name, s.dtype, s.shape, s.offset) for s in layout.segments]
    down = -(-48 * 40 * size // 256) * 256
    assert found == [("gate_up", dtype, (48, 40), 0), ("down", dtype, (40, 24), down)]
    assert layout.nbytes == (48 * 40 + 40 * 24) * size
    assert layout.slot_bytes == -(-(down + 40 * 24 * size) // 4096) * 4096
    assert (layout.hidden, layout.intermediate) == (40, 24)
    assert (layout.up.values.offset, layout.up.values.stride) == (24 * 40 * size, 40 * size)


def test_interleaved_rows_are_two_row_lengths_apart():
    layout = Layout.of(ExpertForm(), FORMATS["bf16"], 40, 24, interleaved=True)
    assert (layout.gate.values.offset, layout.gate.values.stride) == (0, 160)
    assert (layout.up.values.offset, layout.up.values.stride) == (80, 160)
    assert (layout.down.values.offset, layout.down.values.stride) == (3840, 48)


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_matrices_are_views_of_the_bytes_of_their_segments(
    seed, row, has_gate, has_bias, interleaved
):
    """Counts every byte of the slots: each element of a matrix is a byte range of its own."""
    form = ExpertForm(Gate("glu" if has_gate else "plain"), has_gate, has_bias)
    formats = (row, FORMATS["f32"]) if seed % 2 else row
    hidden, intermediate = 2 * random.Random(seed).randint(10, 30), 50
    if row.unit > 1:  # whole blocks
        hidden, intermediate = row.pack, 2 * row.pack
    if interleaved and has_gate and row is BLOCKS:
        with pytest.raises(ValueError, match="cannot alternate where"):
            Layout.of(form, formats, hidden, intermediate, interleaved=True)
        return
    layout = Layout.of(
        form, formats, hidden, intermediate, interleaved=interleaved, bias=torch.float32
    )
    pool = torch.zeros(3, layout.slot_bytes, dtype=torch.uint8)
    matrices = layout.matrices(pool)
    assert (matrices.up is not None) == has_gate
    named = {"gate": matrices.gate, "down": matrices.down}
    named |= {"up": matrices.up} if matrices.up is not None else {}
    for tensor in tensors(named):
        assert tensor.data_ptr() >= pool.data_ptr() and tensor.shape[0] == 3
        bytes_of(tensor).add_(1)  # in place: a copy would leave the pool as it was
    covered = torch.zeros_like(pool)
    for segment in layout.segments:
        covered[:, segment.offset : segment.offset + segment.nbytes] = 1
        assert segment.offset % 256 == 0
    assert torch.equal(pool, covered)
    assert set(layout.views(pool)) == {segment.name for segment in layout.segments}
    assert ("gate_up" in layout.views(pool)) == has_gate
    for matrix in named.values():
        assert (matrix.bias is not None) == has_bias
    # Rows of gate and up, found by hand.
    first = layout.segments[0]
    for matrix, place in ((matrices.gate, 0), (matrices.up, 1)):
        if matrix is None:
            continue
        for i, s in itertools.product(range(intermediate), range(3)):
            file_row = 2 * i + place if interleaved and has_gate else place * intermediate + i
            start = first.offset + file_row * first.row_bytes
            expected = pool[s, start : start + first.row_bytes].data_ptr()
            assert matrix.values[s, i].data_ptr() == expected


def tensors(named: dict[str, Matrix]) -> list[torch.Tensor]:
    found = [t for m in named.values() for t in (m.values, m.scales, m.multiplier, m.bias)]
    return [t for t in found if t is not None]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 view with the same strides, for tensors whose last dimension is contiguous."""
    if tensor.dim() == 1:  # multipliers lie a slot apart
        tensor = tensor.unsqueeze(-1)
    if tensor.dim() == 2:  # biases: elements may lie apart
        tensor = tensor.unsqueeze(-1)
    return tensor.view(torch.uint8)


def test_gate_and_up_have_a_grid_of_scales_each_where_rows_do_not_fill_a_block():
    layout = Layout.of(ExpertForm(), BLOCKS, hidden=64, intermediate=40)
    assert layout["gate_up.scales"].shape == (6, 2)
    scales = layout.up.scales
    assert (scales.offset - layout["gate_up.scales"].offset, scales.count) == (3 * 2 * 4, 3)


def test_gate_and_up_have_a_multiplier_each():
    layout = Layout.of(ExpertForm(), GROUPS, hidden=64, intermediate=40)
    pool = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    matrices = layout.matrices(pool)
    matrices.gate.multiplier[1], matrices.up.multiplier[1] = 2.0, 3.0
    segment = layout["gate_up.multiplier"]
    raw = pool[1, segment.offset : segment.offset + 8].view(torch.float32)
    assert raw.tolist() == [2.0, 3.0] and matrices.gate.multiplier.tolist() == [0.0, 2.0]


def test_columns_that_do_not_fill_a_stored_value_are_refused():
    with pytest.raises(ValueError, match="int4: expected a multiple of 2 columns, got 7"):
        GROUPS.segments(3, 7)


def test_an_unknown_segment_is_refused_with_a_list_of_those_there_are():
    layout = Layout.of(ExpertForm(), FORMATS["bf16"], 8, 4)
    with pytest.raises(KeyError, match="this layout has gate_up, down"):
        layout["up"]

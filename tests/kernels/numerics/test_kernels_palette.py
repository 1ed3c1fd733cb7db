"""bf16 weights of 12 bits in kernels: the outputs of plain bf16, and each byte read once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import small_blocks
import torch
from layers import DEVICE

sys.path.append(str(Path(__file__).parents[2]))
from scaled_weights import ordinary_weights

from benchmarks import kernel_bytes
from moeinf.checkpoint.formats import FORMATS
from moeinf.checkpoint.layout import Layout
from moeinf.checkpoint.palette import bases, encode
from moeinf.kernels import ExpertForm, ExpertMatrices, Matrix, fused_experts

FORM = ExpertForm()


def weights_of(shape: tuple[int, int], rare: int, rng: torch.Generator) -> torch.Tensor:
    """bf16, zeros of both signs among them, and `rare` rare ones in every third row."""
    weights = ordinary_weights(*shape, rng)
    weights[torch.rand(shape, generator=rng) < 0.05] = 0.0
    for row in weights[::3] if rare else ():
        places = torch.randperm(shape[1], generator=rng)[:rare]
        row[places] = torch.tensor([4.0, -(2.0**-60), 2.0**-130]).bfloat16().repeat(rare)[:rare]
    return weights


def pools(H: int, I: int, rare: int, seed: int) -> list[ExpertMatrices]:  # noqa: E741
    """The same two experts in palettes and in plain bf16."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for name in ("palette7", "bf16"):
        layout = Layout.of(FORM, FORMATS[name], H, I)
        pool = torch.full((3, layout.slot_bytes), 255, dtype=torch.uint8, device=DEVICE)
        found.append(layout.matrices(pool))
    for name in ("gate", "up", "down"):
        packed, plain = (getattr(matrices, name).values for matrices in found)
        for e in (0, 2):
            weights = weights_of(plain.shape[1:], rare, rng)
            base, count = bases(weights)
            assert int(count.max()) <= 7
            plain[e], packed[e] = weights, encode(weights, base, 7)
    return found


@pytest.mark.parametrize("path,T", [("vector", 1), ("shared", 3), ("grouped", 18)])
@pytest.mark.parametrize("H,I,rare", [(2880, 64, 0), (64, 704, 7)])
def test_outputs_are_those_of_plain_bf16(
    path: str,
    T: int,
    H: int,
    I: int,  # noqa: E741
    rare: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit where no weight is rare and one loop makes the sums; the matrix products of the
    interpreter have an order of their own."""
    small_blocks.use(monkeypatch, BLOCK_H=256 if H > I else 64, BLOCK_I=256 if I > H else 64)
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=rng).bfloat16().to(DEVICE)
    ids = (torch.randint(0, 2, (T, 1), generator=rng) * 2).to(DEVICE)
    weights = torch.rand(T, 1, generator=rng).to(DEVICE)
    packed, plain = (
        fused_experts(hidden, ids, weights, matrices, FORM, path=path).double()
        for matrices in pools(H, I, rare, seed)
    )
    # Other roundings: of sums, and of each value between the two products.
    least = 2**-6 * plain.abs() + 2**-5 * plain.square().mean(1, keepdim=True).sqrt()
    assert ((packed - plain).abs() <= least).all()
    assert rare or path != "vector" or torch.equal(packed, plain)


@pytest.mark.skipif(DEVICE == "cuda", reason="loads are counted in the interpreter")
@pytest.mark.parametrize("path,T", [("vector", 1), ("shared", 2)])
def test_bytes_of_an_active_expert_are_read_once(
    path: str, T: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one load; two of its lanes have the same word of codes. Then the first entry of each row,
    for no row has more, and for each tile the base exponent, from L1."""
    H, I = 192, 64  # noqa: E741
    small_blocks.use(monkeypatch, BLOCK_H=64, BLOCK_I=64)
    row, rng = FORMATS["palette3"], torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Matrix:
        weights = ordinary_weights(rows, cols, rng)
        stored = encode(weights, bases(weights)[0], 3)
        return Matrix(stored.repeat(3, 1, 1), format=row.name)

    matrices = ExpertMatrices(matrix(I, H), matrix(I, H), matrix(H, I))
    hidden = torch.randn(T, H, generator=rng).bfloat16()
    ids = torch.ones(T, 1, dtype=torch.int64)
    with kernel_bytes.Meter() as meter:
        fused_experts(hidden, ids, torch.ones(T, 1), matrices, FORM, path=path)
    for launch in meter.launches:
        for name, times in launch.times.items():
            _, rows, width = getattr(matrices, name).values.shape
            slots = times.reshape(3, rows, width)
            assert not slots[[0, 2]].any(), "another slot was read"
            blocks, tail = slots[1, :, :-16].reshape(rows, -1, 96), slots[1, :, -16:]
            assert (blocks[..., :32] == 2).all() and (blocks[..., 32:] == 1).all()
            tiles = blocks.shape[1]
            assert (tail == [tiles, 0, 0, 0, 1, 1, 1, 1, *[0] * 8]).all()
            assert launch.loaded[name] == rows * (96 * tiles + tiles + 4)

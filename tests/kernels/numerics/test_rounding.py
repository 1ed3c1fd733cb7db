"""A kernel rounds float32 to bfloat16 as torch does, so that the tests measure kernels alone."""

from __future__ import annotations

import struct

import pytest
import torch
import triton
import triton.language as tl
from layers import DEVICE


@triton.jit
def cast(source_ptr, target_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    value = tl.load(source_ptr + i)
    tl.store(target_ptr + i, value.to(target_ptr.dtype.element_ty))


def from_bits(*bits: int) -> list[float]:
    return [struct.unpack("<f", struct.pack("<I", b))[0] for b in bits]


HARD = from_bits(
    0x3F808000, 0x3F818000,  # ties: down to even, up to even
    0x3F807FFF, 0x3F808001,  # just below and above a tie
    0x3FFFFFFF, 0x3F7FFFFF,  # the carry reaches the exponent
    0x7F7FFFFF, 0xFF7FFFFF,  # the largest, which round to infinity
    0x7F800000, 0xFF800000, 0x80000000, 0x00000000,
    0x00000001, 0x00008000, 0x00018000, 0x807FFFFF,  # subnormal
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype: torch.dtype, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (4096 - len(HARD),), generator=make)
    drawn = bits.to(torch.int32).view(torch.float32)
    source = torch.cat([torch.tensor(HARD), torch.where(drawn.isnan(), 1.0, drawn)])
    target = torch.empty(4096, dtype=dtype, device=DEVICE)
    cast[(1,)](source.to(DEVICE), target, COUNT=4096)
    assert torch.equal(target.cpu().view(torch.int16), source.to(dtype).view(torch.int16))


def test_nan_stays_nan() -> None:
    source = torch.tensor(from_bits(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000))
    target = torch.empty(4, dtype=torch.bfloat16, device=DEVICE)
    cast[(1,)](source.to(DEVICE), target, COUNT=4)
    assert target.isnan().all()

"""The packed formats that benchmarks time, and random weights like trained ones in them."""

from __future__ import annotations

import torch

from moeinf.checkpoint.blocks import BLOCKS
from moeinf.checkpoint.formats import FORMATS, WeightFormat
from moeinf.checkpoint.palette import bases, encode

SCALED = {
    "fp8": FORMATS["e4m3"].with_scales("f32", (128, 128)),
    "fp8-channel": FORMATS["e4m3"].with_scales("bf16", (1, 0)),
    "mxfp8": FORMATS["e4m3"].with_scales("e8m0", (1, 32)),
    "int8": FORMATS["int8"].with_scales("f32", (1, 0)),
    "mxfp4": FORMATS["e2m1"].with_scales("e8m0", (1, 32)),
    "nvfp4": FORMATS["e2m1"].with_scales("e4m3", (1, 16), multiplier=True),
    "int4-32": FORMATS["int4"].with_scales("bf16", (1, 32)),
    "int4-128": FORMATS["int4"].with_scales("bf16", (1, 128)),
    **{name if name != "mxfp4" else "gguf-mxfp4": FORMATS[name] for name in BLOCKS},
}
# The upper byte of each float in a block, and the exponent of MXFP4: products with scales as small
# as random bytes give (subnormal floats) take many times as long.
SCALE_BYTES = {
    "mxfp4": {0: 118},
    "q4_1": {1: 24, 3: 24},
    "q5_1": {1: 24, 3: 24},
    "q2_k": {81: 24, 83: 24},
    "q3_k": {109: 24},
    "q4_k": {1: 24, 3: 24},
    "q5_k": {1: 24, 3: 24},
    "q6_k": {209: 24},
}


def fill_like_weights(piece: str, row: WeightFormat, view: torch.Tensor) -> None:
    """One piece of an expert: random codes, and scales of the size of trained weights'."""
    if piece.endswith((".scales", ".multiplier")):
        view.copy_(torch.full_like(view, 110) if row.scales == "e8m0" else 0.01)
        return
    if row.tail:
        rows = view.view(-1, view.shape[-1])
        weights = (torch.randn(len(rows), row.cols(rows.shape[1])) / 64).bfloat16()
        base, _ = bases(weights)
        # The smallest become 0, so that the tail has room for the rest that is rare.
        weights[weights.abs() < torch.exp2(base.double() - 128)[:, None]] = 0
        rows.copy_(encode(weights, base, row.tail // 4 - 1))
        return
    stored = view.view(torch.uint8)
    if row.name == "e4m3":
        values = (torch.randn(stored.shape) * 64).clamp(-448, 448)
        stored.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
        return
    stored.copy_(torch.randint(0, 256, stored.shape, dtype=torch.uint8))
    if row.name in BLOCKS:
        blocks = stored.view(-1, row.unit)
        for place, value in SCALE_BYTES.get(row.name, {1: 24}).items():
            blocks[:, place] = value

"""Random experts with weights in every format that has scales, and the numbers they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moeinf.checkpoint.blocks import BLOCKS, NUMBERS
from moeinf.checkpoint.formats import (
    FORMATS,
    MULTIPLIER,
    PLAIN_FORMATS,
    SCALES,
    VALUES,
    ZEROS,
    WeightFormat,
)
from moeinf.checkpoint.layout import Formats, Layout, format_of_each
from moeinf.checkpoint.palette import bases, encode
from moeinf.kernels.forms import ExpertForm, Matrix

E4M3, E2M1, INT4, INT8 = (FORMATS[name] for name in ("e4m3", "e2m1", "int4", "int8"))
SCALED = {
    "fp8-128x128-f32": E4M3.with_scales("f32", (128, 128)),
    "fp8-128x128-bf16": E4M3.with_scales("bf16", (128, 128)),
    "fp8-32x32-f16": E4M3.with_scales("f16", (32, 32)),
    "fp8-128x128-e8m0": E4M3.with_scales("e8m0", (128, 128)),
    "fp8-channel": E4M3.with_scales("bf16", (1, 0)),
    "fp8-tensor": E4M3.with_scales(None, None, multiplier=True),
    "mxfp8": E4M3.with_scales("e8m0", (1, 32)),
    "mxfp4": E2M1.with_scales("e8m0", (1, 32)),
    "nvfp4": E2M1.with_scales("e4m3", (1, 16), multiplier=True),
    "int4-32": INT4.with_scales("bf16", (1, 32)),
    "int4-128": INT4.with_scales("f16", (1, 128)),
    "int4-channel": INT4.with_scales("bf16", (1, 0)),
    "int8-channel": INT8.with_scales("f32", (1, 0)),
    "int8-64": INT8.with_scales("f16", (1, 64)),
    "int4-32-zeros": INT4.with_scales("bf16", (1, 32), zeros=True),
    "int4-128-zeros": INT4.with_scales("f16", (1, 128), zeros=True),
    "int4-channel-zeros": INT4.with_scales("f32", (1, 0), zeros=True),
    "int8-32-zeros": INT8.with_scales("bf16", (1, 32), zeros=True),
    "int8-channel-zeros": INT8.with_scales("f16", (1, 0), zeros=True),
}
EVERY = {**SCALED, **{f"gguf-{name}": FORMATS[name] for name in BLOCKS}}
PALETTES = {name: row for name, row in FORMATS.items() if name.startswith("palette")}
# Experts whose gate and up are of two formats: gate, up and down.
MIXED = {
    "q4_k+q6_k": (FORMATS["q4_k"], FORMATS["q6_k"], FORMATS["q5_k"]),
    "int4+int8": (SCALED["int4-128"], SCALED["int8-channel"], SCALED["int4-32"]),
    "int8-zeros+int4": (SCALED["int8-32-zeros"], SCALED["int4-32"], SCALED["int4-channel-zeros"]),
    "bf16+fp8": (FORMATS["bf16"], SCALED["fp8-channel"], FORMATS["bf16"]),
    "fp8+bf16": (SCALED["fp8-128x128-f32"], FORMATS["bf16"], SCALED["fp8-tensor"]),
    "palette+int4": (FORMATS["palette3"], SCALED["int4-32"], FORMATS["bf16"]),
    "fp8+palette": (SCALED["fp8-tensor"], FORMATS["palette15"], SCALED["fp8-tensor"]),
    "nvfp4+mxfp4": (SCALED["nvfp4"], SCALED["mxfp4"], SCALED["nvfp4"]),
}


def whole(formats: Formats, columns: int) -> int:
    """At least so many columns as blocks of the formats."""
    pack = math.lcm(*(row.pack for row in format_of_each(formats)))
    return -(-columns // pack) * pack


def block_scales(row: WeightFormat, raw: torch.Tensor, size: float, rng: torch.Generator) -> None:
    """Gives blocks, uint8 [..., row.unit], scales of around `size`."""
    if row.name == "mxfp4":
        around = 127 + round(math.log2(size))
        raw[..., 0] = torch.randint(around - 2, around + 2, raw.shape[:-1], generator=rng)
        return
    for first, _ in NUMBERS[row.name]:
        drawn = (torch.rand(*raw.shape[:-1], 1, generator=rng) + 0.5) * size
        raw[..., first : first + 2] = drawn.half().view(torch.uint8)


def ordinary_weights(rows: int, cols: int, rng: torch.Generator) -> torch.Tensor:
    """bf16 weights like trained ones, none of them rare. The smallest are zeros."""
    weights = (torch.randn(rows, cols, generator=rng) / math.sqrt(cols)).bfloat16()
    largest = torch.frexp(weights.float().abs().amax(1))[1]
    return weights.masked_fill_(weights.abs() < torch.exp2(largest.double() - 15)[:, None], -0.0)


def palette_rows(stored: torch.Tensor, tail: int, bases: list[int], rng: torch.Generator) -> None:
    """Gives rows of blocks, uint8 [rows, bytes], these base exponents, and rare weights: none, one,
    or all that fit, with the first or the last column among them. Rare weights are subnormal, or
    just below or above the exponents of the row."""
    rows, cols = stored.numpy(), (stored.shape[1] - tail) // 96 * 64
    for n, base in enumerate(bases):
        count = (0, 1, tail // 4 - 1)[n % 3]
        chosen = torch.randperm(cols, generator=rng)[:count].tolist()
        end = (0, cols - 1)[n // 3 % 2]
        if count and end not in chosen:
            chosen[0] = end
        drawn = torch.randint(0, 1 << 16, (count,), generator=rng).tolist()
        words = [base]
        for column, bits in zip(sorted(chosen), drawn, strict=True):
            exponent = (0, max(base - 1, 0), min(base + 15, 254))[bits % 3]
            words.append(column << 16 | exponent << 7 | bits & 0x807F | 1)
            first, j = column // 64 * 96, column % 64
            rows[n, first + j % 32] |= 15 << j // 32 * 4
            rows[n, first + 32 + j] = 0
        words += [0] * (tail // 4 - len(words))
        rows[n, -tail:] = list(b"".join(word.to_bytes(4, "little") for word in words))


@dataclass
class Experts:
    """`pool` is uint8 [E, slot_bytes], 255 wherever no weight lies. dense[e] has float64 weights
    and biases of gate, up and down, None where the form has none."""

    layout: Layout
    form: ExpertForm
    pool: torch.Tensor
    dense: list[list[tuple[torch.Tensor, torch.Tensor | None]]]

    def expected(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [T, H], and the sums of the absolute values of the terms of each element."""
        from moeinf.kernels.gates import reference

        x, weights = hidden.double(), weights.double()
        out, size = torch.zeros_like(x), torch.zeros_like(x)
        for e, (*first, (down, down_bias)) in enumerate(self.dense):
            tokens, places = (ids == e).nonzero(as_tuple=True)
            sums = [x[tokens] @ w.T + (0 if bias is None else bias) for w, bias in first]
            inner = reference(self.form.gate, *sums)
            weight = weights[tokens, places, None]
            y = inner @ down.T + (0 if down_bias is None else down_bias)
            out.index_add_(0, tokens, weight * y)
            size.index_add_(0, tokens, weight.abs() * (inner.abs() @ down.abs().T))
        return out, size


def zero_points(row: WeightFormat) -> tuple[int, int]:
    """The first one, and the one after the last."""
    return (-8, 8) if row.name == "int4" else (-128, 128)


def random_bytes(tensor: torch.Tensor, rng: torch.Generator) -> None:
    """Any bytes but those of the two NaN of e4m3."""
    raw = torch.randint(0, 256, tensor.shape, generator=rng, dtype=torch.uint8)
    if tensor.dtype == torch.float8_e4m3fn:
        raw[(raw & 0x7F) == 0x7F] = 0x36
    tensor.copy_(raw.view(tensor.dtype))


def fill(matrix: Matrix, row: WeightFormat, e: int, rng: torch.Generator) -> torch.Tensor:
    """Gives slot e random weights, whose products with x of size 1 have size 1."""
    parts = {VALUES: matrix.values[e]}
    if row in PLAIN_FORMATS.values():
        rows, cols = matrix.values[e].shape
        matrix.values[e] = torch.randn(rows, cols, generator=rng) / math.sqrt(cols)
        return row.decode(matrix.values[e])
    if row in PALETTES.values():
        rows, cols = len(matrix.values[e]), row.cols(matrix.values[e].shape[1])
        weights = ordinary_weights(rows, cols, rng)
        base, _ = bases(weights)
        stored = encode(weights, base, row.tail // 4 - 1)
        palette_rows(stored, row.tail, base.tolist(), rng)
        matrix.values[e] = stored
        row.refuse(parts, row.name)
        return row.decode(matrix.values[e])
    random_bytes(matrix.values[e], rng)
    if row.unit > 1:
        blocks = matrix.values[e].unflatten(-1, (-1, row.unit))
        block_scales(row, blocks, 1.0, rng)
        numbers = row.decode(matrix.values[e])
        size = 1 / math.sqrt(float(numbers.square().mean()) * numbers.shape[1])
        block_scales(row, blocks, size, rng)
        return row.decode(matrix.values[e])
    decoded = row.decode(matrix.values[e])
    size = 1 / math.sqrt(float(decoded.square().mean()) * decoded.shape[1])
    rest = 1.0
    if matrix.multiplier is not None:
        rest = 1.0 if matrix.scales is None else 20.0
        matrix.multiplier[e] = size / rest * float(torch.rand((), generator=rng) + 0.5)
        parts[MULTIPLIER] = matrix.multiplier[e]
    if matrix.zeros is not None:
        drawn = torch.randint(*zero_points(row), matrix.zeros[e].shape, generator=rng)
        parts[ZEROS] = matrix.zeros[e].copy_(drawn)
    if matrix.scales is not None:
        scales = parts[SCALES] = matrix.scales[e]
        if scales.dtype == torch.uint8:
            around = 127 + round(math.log2(size))
            scales.copy_(torch.randint(around - 2, around + 2, scales.shape, generator=rng))
        else:
            drawn = torch.rand(scales.shape, generator=rng) + 0.5
            scales.copy_(drawn * (rest if matrix.multiplier is not None else size))
    return row.dequantise(parts)


def random_experts(
    formats: Formats,
    hidden: int,
    intermediate: int,
    experts: int,
    seed: int,
    form: ExpertForm | None = None,
    interleaved: bool = False,
) -> Experts:
    form = form or ExpertForm()
    rng = torch.Generator().manual_seed(seed)
    layout = Layout.of(form, formats, hidden, intermediate, interleaved=interleaved)
    pool = torch.full((experts, layout.slot_bytes), 255, dtype=torch.uint8)
    views = layout.matrices(pool)
    dense = []
    for e in range(experts):
        dense.append([])
        for name, placed in layout.named.items():
            matrix = getattr(views, name)
            weights, bias = fill(matrix, placed.format, e, rng), None
            if matrix.bias is not None:
                matrix.bias[e] = torch.randn(matrix.bias.shape[1], generator=rng)
                bias = matrix.bias[e].double()
            dense[-1].append((weights, bias))
    return Experts(layout, form, pool, dense)


def every_code(row: WeightFormat, rows: int, cols: int, seed: int) -> dict[str, torch.Tensor]:
    """The pieces of a matrix that has all values, and all scales whose products are ordinary
    numbers: no NaN, and nothing too large for a float32."""
    rng = torch.Generator().manual_seed(seed)
    parts = {}
    for piece, (dtype, shape) in row.segments(rows, cols).items():
        count = math.prod(shape)
        codes = torch.randperm(count, generator=rng) % 256
        if row in PALETTES.values():
            parts[piece] = codes.to(torch.uint8).view(shape)
            palette_rows(parts[piece], row.tail, [n * 240 // (rows - 1) for n in range(rows)], rng)
            row.refuse(parts, row.name)
            continue
        if row.unit > 1:
            blocks = parts[piece] = codes.to(torch.uint8).view(shape)
            block_scales(row, blocks.unflatten(-1, (-1, row.unit)), 1.0, rng)
            if row.name == "mxfp4":
                blocks[:, :: row.unit] = (codes.view(shape)[:, 1 :: row.unit] % 241).to(torch.uint8)
            continue
        if piece == VALUES:
            assert count >= 256
            if dtype == torch.float8_e4m3fn:
                codes[(codes & 0x7F) == 0x7F] = 0x80
            parts[piece] = codes.to(torch.uint8).view(dtype).view(shape)
        elif piece == ZEROS:
            low, high = zero_points(row)
            parts[piece] = (codes % (high - low) + low).to(dtype).view(shape)
        elif dtype == torch.uint8:
            parts[piece] = (codes % 241).to(dtype).view(shape)
        elif dtype == torch.float8_e4m3fn:
            parts[piece] = (codes % 126 + 1).to(torch.uint8).view(dtype).view(shape)
        else:
            parts[piece] = torch.randn(shape, generator=rng).abs().to(dtype)
    return parts

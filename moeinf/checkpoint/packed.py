"""Weights that lie in several tensors: values, scales, and what else a quantiser wrote.

`join` puts one entry in the place of the tensors of each such matrix, under the name and with the
shape that the matrix has where it is not quantised. So names need no rules for quantised files.
The tensors decide how weights are stored: their names, dtypes and shapes. The configuration says
how many rows and columns share a scale, where shapes allow more than one answer.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeinf.checkpoint import integers, palette
from moeinf.checkpoint.config import Config, quantization
from moeinf.checkpoint.config_groups import ConfigGroups, Integers
from moeinf.checkpoint.formats import FORMATS, MULTIPLIER, SCALES, VALUES, ZEROS, WeightFormat
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed_entry import PackedEntry, make_entry
from moeinf.checkpoint.stored import Stored
from moeinf.errors import CheckpointError, UnsupportedError

SCALE_TYPES = {
    "F32": "f32",
    "BF16": "bf16",
    "F16": "f16",
    "U8": "e8m0",
    "F8_E8M0": "e8m0",
    "F8_E4M3": "e4m3",
}
# Ends of names of the tensors that belong to one matrix; what stands before is the same for all.
# A fused matrix has its own name for its values, and "_" before the others' ends.
_PARTS = re.compile(
    r"(?P<base>.+?)(?:[._](?P<part>weight_scale_inv|weight_scale_2|weight_scale|weight_global_scale"
    r"|weight_packed|weight_palette|weight_shape|weight_zero_point|weight_g_idx|pre_quant_scale|input_scale"
    r"|input_global_scale|scale_inv|scale|blocks|scales|qweight|qzeros|g_idx|absmax|weight))?"
)
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
# Of the quantisation of activations, which are not quantised here; or known from the other shapes.
_UNUSED = ("input_scale", "input_global_scale", "weight_shape", "g_idx")
_REFUSED = {
    "weight_g_idx": "groups in another order than the columns are not supported",
    "pre_quant_scale": "scales of the inputs are not supported",
}


def join(tensors: Mapping[str, TensorEntry], config: Config, file: Path) -> dict[str, TensorEntry]:
    """The tensors by name, each packed matrix as one entry.

    Raises:
        UnsupportedError: the configuration, or a tensor beside weights, is of a format that is not
            supported.
        CheckpointError: tensors of one matrix that do not fit together.
    """
    stated = quantization(config, file)
    groups: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        found = _PARTS.fullmatch(name)
        assert found is not None
        groups[found["base"]][found["part"] or ""] = entry
    joined: dict[str, TensorEntry] = {}
    any_packed = False
    stated_groups = ConfigGroups(stated, file)
    for base, parts in groups.items():
        packed = _packed(base, parts, stated, stated_groups)
        if packed is None:
            joined |= {entry.name: entry for entry in parts.values()}
            continue
        any_packed = True
        joined[packed.name] = packed
        used = {piece.name for piece in packed.pieces.values()}
        for part, entry in parts.items():
            if part not in _UNUSED and entry.name not in used:
                joined[entry.name] = entry
    if stated and not any_packed:
        raise CheckpointError(
            f"{file}: quant_method is {stated.get('quant_method')!r}, expected tensors with "
            "scales, found none"
        )
    return joined


def _packed(
    base: str,
    parts: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    groups: ConfigGroups,
) -> PackedEntry | None:
    """The entry of a packed matrix; None where the tensors are ordinary ones."""
    if "blocks" in parts and "scales" in parts:
        return _mxfp4_blocks(base, parts["blocks"], parts["scales"])
    if "qweight" in parts and "scales" in parts:
        return integers.entry(base, parts, config)
    if "weight_palette" in parts:
        return _palette(base, parts["weight_palette"])
    name, values = base, parts.get("")
    if "weight_packed" in parts:
        name, values = f"{base}.weight", parts["weight_packed"]
    elif "weight" in parts:
        name, values = parts["weight"].name, parts["weight"]
    scales = next((parts[part] for part in _SCALES if part in parts), None)
    if values is None or scales is None or values.dtype not in ("F8_E4M3", "I8", "U8", "I32"):
        return None
    for part, why in _REFUSED.items():
        if part in parts:
            raise UnsupportedError(f"{parts[part].path}: {parts[part]}: {why}")
    if len(values.shape) < 2 or 0 in values.shape:
        raise CheckpointError(f"{values.path}: {values}: expected a matrix, to go with {scales}")
    second = parts.get("weight_scale_2") or parts.get("weight_global_scale")
    stated = groups.find(base, values, scales) if values.dtype in ("I32", "I8") else None
    row, columns = _values_row(values, scales, stated)
    shape = (*values.shape[:-1], columns)
    pieces, stored = {VALUES: values}, dict[str, Stored]()
    if _by_columns(row, values, scales):
        *lead, half, rows = values.shape
        shape, pieces[SCALES] = (*lead, rows, 2 * half), scales
        row = row.with_scales("e4m3", (1, 16), multiplier=second is not None)
        stored = {VALUES: Stored(turned=1), SCALES: Stored(turned=1)}
    elif scales.shape in ((), (1,)) and second is None:
        pieces[MULTIPLIER] = scales
        row = row.with_scales(None, None, multiplier=True)
    else:
        block = _block(row, values, scales, shape, config, stated)
        zeros = parts.get("weight_zero_point")
        row = row.with_scales(
            SCALE_TYPES[scales.dtype], block, multiplier=second is not None, zeros=zeros is not None
        )
        pieces[SCALES] = scales
        if values.dtype == "I32" and row.name == "int8":
            stored[VALUES] = Stored(code="signs")
        if zeros is not None:
            pieces[ZEROS] = zeros
            stored |= _zero_points(row, zeros, scales, shape)
    if second is not None:
        numbers = (1,) if len(shape) == 2 else (shape[0], 2 * shape[0])
        if second.dtype != "F32" or math.prod(second.shape) not in numbers:
            raise CheckpointError(
                f"{second.path}: {second}: expected one F32 number for each matrix of {values}"
            )
        pieces[MULTIPLIER] = second
    return make_entry(name, row, shape, pieces, "weight_global_scale" in parts, stored)


def _palette(base: str, values: TensorEntry) -> PackedEntry:
    """bf16 in 12 bits. The tail of a row says which of the formats it is: no two of them have the
    same bytes modulo a block."""
    *lead, stored = values.shape if len(values.shape) > 1 else (0, 0)
    for rare in palette.RARE:
        row = FORMATS[f"palette{rare}"]
        if values.dtype == "U8" and 0 not in lead and stored % row.unit == row.tail < stored:
            return make_entry(f"{base}.weight", row, (*lead, row.cols(stored)), {VALUES: values})
    raise CheckpointError(
        f"{values.path}: {values}: expected U8 rows of bf16 in 12 bits: blocks of "
        f"{palette.BLOCK_BYTES} bytes and a tail of "
        f"{', '.join(str(palette.tail_bytes(rare)) for rare in palette.RARE)} bytes"
    )


def _by_columns(row: WeightFormat, values: TensorEntry, scales: TensorEntry) -> bool:
    """Whether the matrices of all experts are [experts, inputs, outputs], as ModelOpt writes those
    that a module holds so: two inputs in a byte, 16 to a scale."""
    if row.name != "e2m1" or scales.dtype != "F8_E4M3" or len(values.shape) != 3:
        return False
    experts, half, rows = values.shape
    return scales.shape == (experts, half // 8, rows) and half % 8 == 0


def _mxfp4_blocks(base: str, blocks: TensorEntry, scales: TensorEntry) -> PackedEntry:
    """Blocks of 16 bytes beside each other: [experts, rows, blocks, 16]."""
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != 16:
        raise CheckpointError(f"{blocks.path}: {blocks}: expected U8 [experts, rows, blocks, 16]")
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(
            f"{scales.path}: {scales}: expected U8 {list(blocks.shape[:-1])}, to go with {blocks}"
        )
    row = FORMATS["e2m1"].with_scales("e8m0", (1, 32))
    shape = (*blocks.shape[:2], 32 * blocks.shape[2])
    return make_entry(base, row, shape, {VALUES: blocks, SCALES: scales})


def _values_row(
    values: TensorEntry, scales: TensorEntry, stated: Integers | None
) -> tuple[WeightFormat, int]:
    """How the values are stored, and how many columns they have."""
    last, kind = values.shape[-1], SCALE_TYPES.get(scales.dtype)
    if kind is None:
        raise CheckpointError(
            f"{scales.path}: {scales}: expected scales of {', '.join(SCALE_TYPES)}, to go with "
            f"{values}"
        )
    if values.dtype == "F8_E4M3":
        return FORMATS["e4m3"], last
    if values.dtype == "I32":
        bits = stated.bits if stated else 4
        if bits in (4, 8):
            return FORMATS[f"int{bits}"], 32 // bits * last
        raise UnsupportedError(
            f"{values.path}: {values}: integers of {bits} bits, expected 4 or 8, as config_groups "
            f"has in {stated.group if stated else ''}"
        )
    if kind in ("e8m0", "e4m3"):
        return FORMATS["e2m1"], 2 * last
    if values.dtype == "I8":
        return FORMATS["int8"], last
    raise CheckpointError(
        f"{values.path}: {values}: expected scales of F8_E4M3 or F8_E8M0, found {scales}"
    )


def _zero_points(
    row: WeightFormat, zeros: TensorEntry, scales: TensorEntry, shape: Sequence[int]
) -> dict[str, Stored]:
    """How they are stored: a byte beside each scale, or words of the rows of a column."""
    bits = 8 // row.pack
    rows, grid = shape[-2], (*scales.shape[:2], 1)[:2]
    if len(shape) != 2 or row.name not in ("int4", "int8") or row.block is None or row.block[0] > 1:
        raise UnsupportedError(
            f"{zeros.path}: {zeros}: zero points are supported of integers in one matrix, with a "
            f"scale for each row or group; found {list(shape)}"
        )
    if zeros.dtype == "I8" and (*zeros.shape, 1)[:2] == grid:
        return {}
    words, rest = divmod(rows * bits, 32)
    if zeros.dtype == "I32" and not rest and (*zeros.shape, 1)[:2] == (words, grid[1]):
        return {ZEROS: Stored(code="zeros", bits=bits)}
    raise CheckpointError(
        f"{zeros.path}: {zeros}: expected I8 {list(grid)} or I32 {[words, grid[1]]}, to go with "
        f"{scales}"
    )


def _block(
    row: WeightFormat,
    values: TensorEntry,
    scales: TensorEntry,
    shape: Sequence[int],
    config: Mapping[str, Any],
    stated: Integers | None,
) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    *lead, rows, cols = shape
    grid = list(scales.shape)
    if grid in ([*lead, rows], [*lead, rows, 1]):
        return 1, 0
    size = config.get("weight_block_size")
    candidates = [(1, 16), (1, 32), (1, 64), (1, 128)]
    if stated is not None and stated.size and row.name.startswith("int"):
        candidates = [(1, stated.size)]
    if row.name == "e4m3":
        candidates = [(128, 128), (1, 32)]
        if isinstance(size, list) and len(size) == 2:
            candidates = [(int(size[0]), int(size[1])), (1, 32)]
    for high, wide in candidates:
        if grid == [*lead, -(-rows // high), -(-cols // wide)]:
            return high, wide
    by = f" with {stated.bits} bits, as config_groups has in {stated.group}" if stated else ""
    raise CheckpointError(
        f"{scales.path}: {scales}: expected a scale for each "
        + " or ".join(f"{high} x {wide}" for high, wide in candidates)
        + f" block, for each row or for all, to go with {values}{by}"
    )

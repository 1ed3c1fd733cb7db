"""Matrices of GPTQ and AWQ: integers in words, with scales and zero points, column by column.

| | GPTQ | AWQ |
|---|---|---|
| qweight | I32 [inputs * bits / 32, outputs] | I32 [inputs, outputs * bits / 32] |
| qzeros | I32 [groups, outputs * bits / 32] | the same |
| scales | floats [groups, outputs] | the same |
| g_idx | I32 [inputs], the group of each | |

A weight is (integer - zero point) * scale. Files of GPTQ hold zero points less one, except those of
version 2. The shapes decide between the two, and say how many bits an integer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moeinf.checkpoint.formats import FORMATS, SCALES, VALUES, ZEROS
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed_entry import PackedEntry, make_entry
from moeinf.checkpoint.stored import Stored
from moeinf.errors import CheckpointError, UnsupportedError

FLOATS = {"F16": "f16", "BF16": "bf16", "F32": "f32"}
PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq")  # of auto-round


def entry(base: str, parts: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> PackedEntry:
    """The matrix of these tensors.

    Raises:
        UnsupportedError: a layout with the same names that is neither of the two.
        CheckpointError: tensors that do not fit together.
    """
    values, scales, zeros = parts["qweight"], parts["scales"], parts.get("qzeros")
    where = f"{values.path}: {values}"
    for key, known in (("checkpoint_format", ("gptq", "gptq_v2")), ("version", ("gemm",))):
        stated = config.get(key)
        if stated is not None and str(stated).lower() not in known:
            raise UnsupportedError(f"{where}: {key} is {stated!r}, expected {' or '.join(known)}")
    if config.get("quant_method") == "auto-round" and config.get("packing_format") not in PACKINGS:
        raise UnsupportedError(
            f"{where}: packing_format is {config.get('packing_format')!r}, expected "
            f"{' or '.join(PACKINGS)}"
        )
    if zeros is None or scales.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: expected qzeros and scales of {', '.join(FLOATS)}, found {scales}"
        )
    for one in (values, zeros, scales):
        if len(one.shape) != 2 or 0 in one.shape or (one is not scales and one.dtype != "I32"):
            raise CheckpointError(f"{one.path}: {one}: expected I32 words in a matrix")
    groups, outputs = scales.shape
    is_gptq = values.shape[1] == outputs
    bits, rest = divmod(32 * (zeros if is_gptq else values).shape[1], outputs)
    if rest or bits not in ((4, 8) if is_gptq else (4,)) or outputs * bits % 32:
        raise UnsupportedError(
            f"{where}: expected integers of {'4 or 8' if is_gptq else '4'} bits and a multiple of "
            f"8 outputs, found scales {list(scales.shape)} and qzeros {list(zeros.shape)}"
        )
    if zeros.shape != (groups, outputs * bits // 32):
        raise CheckpointError(
            f"{zeros.path}: {zeros}: expected I32 {[groups, outputs * bits // 32]}, to go with "
            f"{scales}"
        )
    inputs = values.shape[0] * (32 // bits if is_gptq else 1)
    if inputs % 8:
        raise UnsupportedError(f"{where}: expected a multiple of 8 inputs, found {inputs}")
    row = FORMATS[f"int{bits}"].with_scales(
        FLOATS[scales.dtype], (1, _group(where, inputs, groups, config)), zeros=True
    )
    plus = int(is_gptq and config.get("checkpoint_format") != "gptq_v2")
    if is_gptq:
        how = Stored(turned=4, code="signs" if bits == 8 else "", bits=bits)
        zero_points = Stored(turned=4, code="zeros", bits=bits, plus=plus)
    else:
        how, zero_points = Stored(turned=4, code="awq"), Stored(turned=4, code="awq_zeros")
    stored = {
        VALUES: how,
        SCALES: Stored(turned=4 if scales.dtype == "F32" else 2),
        ZEROS: zero_points,
    }
    order = parts.get("g_idx")
    if order is None and config.get("desc_act"):
        raise UnsupportedError(
            f"{where}: desc_act is true: groups in another order than the inputs"
        )
    if order is not None and (order.dtype, order.shape) != ("I32", (inputs,)):
        raise CheckpointError(f"{order.path}: {order}: expected I32 [{inputs}]")
    pieces = {VALUES: values, SCALES: scales, ZEROS: zeros}
    name, shape = f"{base}.weight", (outputs, inputs)
    return make_entry(name, row, shape, pieces, stored=stored, groups=order)


def _group(where: str, inputs: int, groups: int, config: Mapping[str, Any]) -> int:
    """How many inputs share a scale; 0: all."""
    size = config.get("group_size")
    if groups == 1:
        return 0
    if type(size) is int and size > 0 and -(-inputs // size) == groups:
        return size
    if inputs % groups:
        raise CheckpointError(
            f"{where}: expected groups of a size that divides {inputs} inputs, or the group_size "
            f"of the configuration, {size!r}; found {groups} groups"
        )
    return inputs // groups


def check_groups(entry: PackedEntry, raw: torch.Tensor) -> None:
    """`raw`: the bytes of `entry.groups`.

    Raises:
        UnsupportedError: groups that are not in the order of the inputs (desc_act).
    """
    assert entry.groups is not None and entry.format.block is not None
    found = raw.view(torch.int32)
    inputs = found.numel()
    expected = torch.arange(inputs, dtype=torch.int32) // (entry.format.block[1] or inputs)
    if not torch.equal(found, expected):
        at = int((found != expected).nonzero()[0])
        raise UnsupportedError(
            f"{entry.groups.path}: {entry.groups}: groups in another order than the inputs "
            f"(desc_act) are not supported: expected input {at} in group {int(expected[at])}, "
            f"found {int(found[at])}"
        )

"""The formats that experts can be quantised to: one row of TARGETS each.

Values are rounded to nearest, ties to even. A scale is rounded to its own type first, and the
values are rounded for the scale that is stored. Everything runs in float32, a matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from moeinf.checkpoint.config import BF16_PALETTE
from moeinf.checkpoint.formats import FORMATS, MULTIPLIER, SCALES, VALUES, WeightFormat, numbers_of

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_LEAST = 2.0**-9
TINY = torch.finfo(torch.float32).tiny
INT_GROUPS = (128, 64, 32)  # columns that share a scale of 8-bit integers: the first that divides

Pieces = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One format to write.

    row       how the matrices are stored
    names     piece -> end of its tensor's name
    config    quantization_config of the row, with the names of modules that stay as they are
    quantise  matrices that share a multiplier, float32 [rows, cols] each -> the pieces of each
    words     dtype in which the values are stored: several of them in one element
    """

    row: WeightFormat
    names: Mapping[str, str]
    config: Callable[[WeightFormat, list[str]], dict[str, Any] | None]
    quantise: Callable[[WeightFormat, Sequence[torch.Tensor]], list[Pieces]]
    words: torch.dtype | None = None

    def for_sizes(self, sizes: Sequence[int]) -> Target:
        """The row for matrices of these numbers of columns.

        Raises:
            ValueError: the columns are no whole number of groups.
        """
        found = self
        if self.row.name == "int8":
            fitting = [one for one in INT_GROUPS if all(size % one == 0 for size in sizes)]
            group = fitting[0] if fitting else INT_GROUPS[-1]
            found = replace(self, row=replace(self.row, block=(1, group)))
        high, wide = found.row.block or (1, 1)
        if high == 1 and any(size % wide for size in sizes):
            odd = next(size for size in sizes if size % wide)
            raise ValueError(f"expected columns in groups of {wide}, found {odd} columns")
        return found

    def specs(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Piece -> dtype and shape in the file."""
        found = self.row.segments(rows, cols)
        if self.words is not None:
            dtype, (high, wide) = found[VALUES]
            found[VALUES] = self.words, (high, wide * dtype.itemsize // self.words.itemsize)
        return found

    def stored(self, pieces: Pieces) -> Pieces:
        """The pieces as the file has them. A multiplier is stored as a divisor."""
        found = dict(pieces)
        if self.words is not None:
            found[VALUES] = found[VALUES].view(self.words)
        if MULTIPLIER in found:
            found[MULTIPLIER] = found.pop("divisor")
        return found


def _amax(weights: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups]"""
    return weights.view(len(weights), -1, group).abs().amax(-1)


def _over(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[rows, cols] over [rows, groups]: in groups, [rows, groups, group]."""
    return weights.view(*scales.shape, -1) / scales[..., None]


def _nibbles(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Codes below 16 in pairs: the first is the lower half of a byte."""
    pairs = codes.view(rows, -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; of a tie the even code.

    Below 2 the step is .5, below 4 it is 1, and then 2: each range counts its steps, and the least
    of the three counts is that of the number's own range.
    """
    size = numbers.abs().clamp_(max=E2M1_MAX)
    codes = (size * 2).round_()
    torch.minimum(codes, size.round().add_(2), out=codes)
    torch.minimum(codes, (size / 2).round_().add_(4), out=codes)
    return codes.to(torch.uint8) | (numbers.signbit().to(torch.uint8) << 3)


def _fp8(row: WeightFormat, matrices: Sequence[torch.Tensor]) -> list[Pieces]:
    assert row.block is not None
    high, wide = row.block
    found = []
    for weights in matrices:
        rows, cols = weights.shape
        padded = F.pad(weights, (0, -cols % wide, 0, -rows % high))
        blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        amax = blocks.abs().amax((1, 3))
        scales = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp_min(TINY))
        values = (blocks / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
        values = values.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :cols].contiguous()
        found.append({VALUES: values, SCALES: scales})
    return found


def _ints(row: WeightFormat, matrices: Sequence[torch.Tensor]) -> list[Pieces]:
    assert row.block is not None
    bits = 8 // row.pack
    half = 2.0 ** (bits - 1)
    found = []
    for weights in matrices:
        amax = _amax(weights, row.block[1])
        scales = torch.where(amax == 0, 1.0, (amax / (half - 0.5)).clamp_min(TINY)).bfloat16()
        codes = _over(weights, scales.float()).round_().clamp_(-half, half - 1)
        if bits == 8:
            values = codes.to(torch.int8).view(weights.shape)
        else:
            values = _nibbles(codes.add_(half).to(torch.uint8), len(weights))
        found.append({VALUES: values, SCALES: scales})
    return found


def _mxfp4(row: WeightFormat, matrices: Sequence[torch.Tensor]) -> list[Pieces]:
    assert row.block is not None
    found = []
    for weights in matrices:
        fraction, exponent = torch.frexp(_amax(weights, row.block[1]))  # fraction in [.5, 1)
        # The largest number becomes 4 to 7 times the scale; from 7 on it is nearer to 8 than to 6.
        codes = (exponent - 3 + (fraction >= 0.875) + 127).clamp_(1, 254).to(torch.uint8)
        values = _e2m1(_over(weights, numbers_of(codes).float()))
        found.append({VALUES: _nibbles(values, len(weights)), SCALES: codes})
    return found


def _nvfp4(row: WeightFormat, matrices: Sequence[torch.Tensor]) -> list[Pieces]:
    assert row.block is not None
    most = max(float(weights.abs().max()) for weights in matrices)
    divisor = torch.tensor([E4M3_MAX * E2M1_MAX / most if most else 1.0]).clamp_(TINY, 1 / TINY)
    multiplier = (1 / divisor.double()).float()  # as the reader makes it
    found = []
    for weights in matrices:
        wanted = _amax(weights, row.block[1]) / (E2M1_MAX * multiplier)
        scales = wanted.clamp_(E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn)
        values = _e2m1(_over(weights, scales.float() * multiplier))
        pieces = {VALUES: _nibbles(values, len(weights)), SCALES: scales}
        found.append({**pieces, MULTIPLIER: multiplier, "divisor": divisor})
    return found


def _bf16(row: WeightFormat, matrices: Sequence[torch.Tensor]) -> list[Pieces]:
    return [{VALUES: weights.bfloat16()} for weights in matrices]


def _fp8_config(row: WeightFormat, others: list[str]) -> dict[str, Any]:
    assert row.block is not None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(row.block),
        "modules_to_not_convert": others,
    }


def _compressed(form: str, **weights: Any) -> Callable[[WeightFormat, list[str]], dict[str, Any]]:
    """The configuration of compressed-tensors: all linear layers but `others` are of this form."""

    def config(row: WeightFormat, others: list[str]) -> dict[str, Any]:
        assert row.block is not None
        of_weights = {
            "num_bits": 8 // row.pack,
            "type": "int",
            "strategy": "group",
            "group_size": row.block[1],
            "symmetric": True,
            "dynamic": False,
            **weights,
        }
        group = {
            "targets": ["Linear"],
            "weights": of_weights,
            "input_activations": None,
            "output_activations": None,
            "format": form,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": others,
        }

    return config


_WEIGHT = {VALUES: ".weight", SCALES: ".weight_scale"}
_PACKED = {VALUES: ".weight_packed", SCALES: ".weight_scale"}
SHAPE = ".weight_shape"  # of words: how many elements they hold

TARGETS = {
    "bf16": Target(FORMATS["bf16"], {VALUES: ".weight"}, lambda row, others: None, _bf16),
    "fp8": Target(
        FORMATS["e4m3"].with_scales("f32", (128, 128)),
        {VALUES: ".weight", SCALES: ".weight_scale_inv"},
        _fp8_config,
        _fp8,
    ),
    "int8": Target(
        FORMATS["int8"].with_scales("bf16", (1, INT_GROUPS[0])),
        _WEIGHT,
        _compressed("int-quantized"),
        _ints,
    ),
    "int4": Target(
        FORMATS["int4"].with_scales("bf16", (1, 32)),
        _PACKED,
        _compressed("pack-quantized"),
        _ints,
        words=torch.int32,
    ),
    "mxfp4": Target(
        FORMATS["e2m1"].with_scales("e8m0", (1, 32)),
        _PACKED,
        _compressed("mxfp4-pack-quantized", type="float", scale_dtype="torch.uint8"),
        _mxfp4,
    ),
    "nvfp4": Target(
        FORMATS["e2m1"].with_scales("e4m3", (1, 16), multiplier=True),
        {**_PACKED, MULTIPLIER: ".weight_global_scale"},
        _compressed(
            "nvfp4-pack-quantized",
            type="float",
            strategy="tensor_group",
            scale_dtype="torch.float8_e4m3fn",
        ),
        _nvfp4,
    ),
}

# Of linear layers outside the experts. In nvfp4 runtimes that fuse layers need a scale of them all.
DENSE = ("fp8", "int8", "int4", "mxfp4")


def check_dense(format: str | None, dense: str) -> None:
    """Raises ValueError unless one configuration can say both."""
    if dense not in DENSE:
        raise ValueError(f"dense={dense!r}: expected one of {', '.join(DENSE)}")
    if format in (None, "bf16"):
        raise ValueError(f"dense={dense!r} goes with experts in a format of fewer bits: give one")
    if format == BF16_PALETTE:
        raise ValueError(f"dense={dense!r} rounds weights, and format={format!r} keeps all bits")
    if (format == "fp8") != (dense == "fp8"):
        raise ValueError(
            f"dense={dense!r} does not go with format={format!r}: a checkpoint of fp8 blocks has "
            "no other format"
        )


def configuration(
    experts: Target, others: list[str], linear: Mapping[str, Target]
) -> dict[str, Any] | None:
    """The quantization_config of experts, of linear layers by name, and of others as they are."""
    config = experts.config(experts.row, others)
    target = next(iter(linear.values()), experts)
    if config is None or target.row == experts.row:
        return config
    stated = target.config(target.row, [])
    assert stated is not None
    groups = {
        **config["config_groups"],
        "group_1": {**stated["config_groups"]["group_0"], "targets": [*linear]},
    }
    return {**config, "format": "mixed-precision", "config_groups": groups}

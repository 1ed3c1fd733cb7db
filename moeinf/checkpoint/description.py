"""The description of a store's experts that the C library opens.

The names of tensors are read in Python alone. The description says in text what came of it: where
every expert lies, and what it computes. csrc/capi/description.h has the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moeinf import _core
from moeinf.checkpoint.extent import Extent
from moeinf.checkpoint.headers import FileState
from moeinf.checkpoint.layout import Layout, MatrixLayout, Rows
from moeinf.errors import UnsupportedError
from moeinf.kernels.forms import ExpertForm

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Described:
    """What a description says. `experts`: the extents of every expert, layer by layer.

    transposes, checks, recodes and palettes are those of `_core.Catalog`.
    """

    form: ExpertForm
    layout: Layout
    num_layers: int
    experts: Sequence[list[Extent]]
    transposes: Sequence[tuple[int, int, int, int]]
    checks: Sequence[tuple[int, int, _core.ScaleType | None, bool, int]]
    recodes: Sequence[tuple[str, int, int, int, int, int]]
    palettes: Sequence[tuple[int, int, int, int]]

    def lines(self) -> Iterator[str]:
        layout, gate, num_experts = self.layout, self.form.gate, len(self.experts)
        yield "moeinf experts 1"
        yield f"shape {self.num_layers} {num_experts // self.num_layers} {layout.slot_bytes}"
        yield f"function {gate.function} {gate.activation} {gate.alpha} {gate.limit}"
        for name, matrix in layout.named.items():
            yield from _matrix_lines(name, matrix)
        for offset, rows, cols, element in self.transposes:
            yield f"transpose {offset} {rows} {cols} {element}"
        for offset, nbytes, kind, negative, step in self.checks:
            if kind is None:
                yield f"zero_points {offset} {nbytes}"
                continue
            name = str(kind).removeprefix("ScaleType.")
            yield f"check {offset} {nbytes} {name} {int(negative)} {step}"
        for palette in self.palettes:
            yield " ".join(map(str, ("palette", *palette)))
        for recode in self.recodes:
            yield " ".join(map(str, ("recode", *recode)))
        files: dict[FileState, int] = {}
        for one in (extent for extents in self.experts for extent in extents):
            file = one.entry.file
            if file not in files:
                files[file] = len(files)
                yield _file_line(file, 16 * num_experts)
            yield f"extent {files[file]} {one.file_offset} {one.nbytes} {one.slot_offset}"
        yield "end"


def _matrix_lines(name: str, matrix: MatrixLayout) -> Iterator[str]:
    def place(rows: Rows) -> str:
        return f"{rows.offset} {rows.stride}"

    row = matrix.format
    yield f"matrix {name} {row.name} {matrix.rows} {matrix.cols} {place(matrix.values)}"
    if matrix.scales is not None:
        assert row.block is not None
        yield f"scales {row.scales} {place(matrix.scales)} {row.block[0]} {row.block[1]}"
    if matrix.zeros is not None:
        yield f"zeros {place(matrix.zeros)}"
    if matrix.multiplier is not None:
        yield f"multiplier {matrix.multiplier.offset}"
    if matrix.bias is not None:
        yield f"bias {DTYPES[matrix.bias.segment.dtype]} {place(matrix.bias)}"


def _file_line(file: FileState, most_held: int) -> str:
    if file.source is None:
        path = str(file.path.resolve())
        if "\n" in path:
            raise UnsupportedError(f"{path!r}: a description cannot name a path of two lines")
        return f"file {file.nbytes} {file.modified_ns} {path}"
    if file.nbytes > most_held:
        raise UnsupportedError(
            f"{file.path}: expected experts in files, found some that this process holds: give "
            "them to moeinf_store_create() as pointers or by a function"
        )
    held = bytearray(file.nbytes)  # the multipliers of experts, see ExpertStore
    file.source.read(0, held)
    return f"held {held.hex()} {file.path}"

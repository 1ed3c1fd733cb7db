"""How an expert lies in a slot: its segments, and its three matrices as views into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moeinf.checkpoint.formats import BIAS, MULTIPLIER, SCALES, VALUES, ZEROS, WeightFormat
from moeinf.kernels.forms import ExpertForm, ExpertMatrices, Matrix

SLOT_ALIGNMENT = 4096  # a page: what direct reads and huge pages want
SEGMENT_ALIGNMENT = 256  # a GPU's widest loads, with room

Formats = WeightFormat | tuple[WeightFormat, ...]
"""Of all matrices; of gate and up, and of down; or of gate, of up and of down."""


@dataclass(frozen=True)
class Segment:
    """One named run of bytes of an expert: `nbytes` bytes from `offset`, counted from the slot."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        """[slots, *shape] of a pool, uint8 [slots, slot_bytes]."""
        flat = pool[:, self.offset : self.offset + self.nbytes]
        return flat.view(self.dtype).unflatten(1, self.shape)


@dataclass(frozen=True)
class Rows:
    """`count` rows of a segment: row `first` and every `step`-th row after it."""

    segment: Segment
    first: int
    step: int
    count: int

    @property
    def offset(self) -> int:
        """Of the first row, in bytes from the slot."""
        return self.segment.offset + self.first * self.segment.row_bytes

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return self.step * self.segment.row_bytes

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        end = self.first + self.step * (self.count - 1) + 1
        return self.segment.view(pool)[:, self.first : end : self.step]


@dataclass(frozen=True)
class MatrixLayout:
    """Where one matrix of an expert lies in a slot: `rows` outputs, `cols` inputs."""

    format: WeightFormat
    rows: int
    cols: int
    values: Rows
    scales: Rows | None
    zeros: Rows | None
    multiplier: Rows | None
    bias: Rows | None

    def view(self, pool: torch.Tensor) -> Matrix:
        def view(rows: Rows | None) -> torch.Tensor | None:
            return None if rows is None else rows.view(pool)

        multiplier = view(self.multiplier)
        return Matrix(
            values=self.values.view(pool),
            scales=view(self.scales),
            bias=view(self.bias),
            format=self.format.name,
            block=self.format.block,
            multiplier=None if multiplier is None else multiplier[:, 0],
            zeros=view(self.zeros),
        )


@dataclass(frozen=True)
class Layout:
    """The ordered segments of an expert; `slot_bytes` is their size rounded up to 4096.

    Gate and up of one format share their segments (`gate_up`, `gate_up.scales`, `gate_up.bias`).
    Of two formats, each has its own (`gate`, `gate.scales`, `up`, ...); an expert without a gate
    has those of gate. The segments of down follow.
    """

    segments: tuple[Segment, ...]
    gate: MatrixLayout
    up: MatrixLayout | None
    down: MatrixLayout

    @classmethod
    def of(
        cls,
        form: ExpertForm,
        formats: Formats,
        hidden: int,
        intermediate: int,
        *,
        interleaved: bool = False,
        bias: torch.dtype = torch.bfloat16,
    ) -> Layout:
        """Lays out the expert's tensors one after another, each aligned.

        Args:
            formats: see `Formats`.
            interleaved: rows of gate and up alternate; else all rows of gate come first.
            bias: dtype of the biases, where the form has them.
        """
        of_gate, of_up, of_down = format_of_each(formats)
        names: dict[str, tuple[WeightFormat, int]] = {"gate": (of_gate, 1)}
        if form.has_gate and of_gate == of_up:
            names = {"gate_up": (of_gate, 2)}
        elif form.has_gate:
            names["up"] = of_up, 1
            if interleaved:
                raise ValueError(
                    "rows of gate and up cannot alternate where their formats differ: "
                    f"{of_gate.name} and {of_up.name}"
                )
        bias_dtype = bias if form.has_bias else None
        segments: list[Segment] = []
        found: list[MatrixLayout] = []
        for name, (row, parts) in names.items():
            found += _place(
                segments, name, row, intermediate, hidden, parts, interleaved, bias_dtype
            )
        (down,) = _place(segments, "down", of_down, hidden, intermediate, 1, False, bias_dtype)
        gate, *up = found
        return cls(tuple(segments), gate, up[0] if up else None, down)

    @property
    def named(self) -> dict[str, MatrixLayout]:
        """gate, up and down by name; no up where the expert has none."""
        every = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: matrix for name, matrix in every.items() if matrix is not None}

    @property
    def format_names(self) -> str:
        """Each format of the matrices once, in their order: "q4_k, q6_k"."""
        return ", ".join(dict.fromkeys(matrix.format.name for matrix in self.named.values()))

    def held_by(self, segment: Segment) -> MatrixLayout:
        """The matrix that lies in a segment, or the first one of two."""
        return self.named[segment.name.partition(".")[0].removesuffix("_up")]

    @property
    def hidden(self) -> int:
        return self.down.rows

    @property
    def intermediate(self) -> int:
        return self.down.cols

    @property
    def slot_bytes(self) -> int:
        last = self.segments[-1]
        return _round_up(last.offset + last.nbytes, SLOT_ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, without padding."""
        return sum(segment.nbytes for segment in self.segments)

    def __getitem__(self, name: str) -> Segment:
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(f"{name!r}; this layout has {', '.join(s.name for s in self.segments)}")

    def views(self, pool: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a pool, uint8 [slots, slot_bytes]: each segment as [slots, *shape]."""
        return {segment.name: segment.view(pool) for segment in self.segments}

    def matrices(self, pool: torch.Tensor) -> ExpertMatrices:
        """The matrices of every slot of a pool, uint8 [slots, slot_bytes], as strided views."""
        return ExpertMatrices(
            gate=self.gate.view(pool),
            up=None if self.up is None else self.up.view(pool),
            down=self.down.view(pool),
        )


def format_of_each(formats: Formats) -> tuple[WeightFormat, ...]:
    """Of gate, of up and of down."""
    every = formats if isinstance(formats, tuple) else (formats, formats)
    return every if len(every) == 3 else (every[0], *every)


def lay_out_matrix(row: WeightFormat, rows: int, cols: int) -> tuple[int, MatrixLayout]:
    """How one matrix lies in bytes of its own, and their number."""
    segments: list[Segment] = []
    (matrix,) = _place(segments, "weight", row, rows, cols, 1, False, None)
    return _round_up(segments[-1].offset + segments[-1].nbytes, SEGMENT_ALIGNMENT), matrix


def _place(
    segments: list[Segment],
    name: str,
    format_: WeightFormat,
    rows: int,
    cols: int,
    parts: int,
    interleaved: bool,
    bias: torch.dtype | None,
) -> list[MatrixLayout]:
    """Appends the segments that `parts` matrices of [rows, cols] share; returns the matrices."""
    pieces: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {**format_.segments(rows, cols)}
    if bias is not None:
        pieces[BIAS] = (bias, (rows,))
    found: dict[str, list[Rows]] = {}
    for piece, (dtype, (count, *width)) in pieces.items():
        if interleaved and parts > 1 and piece == SCALES and count != rows:
            raise ValueError(
                f"{name}: rows of gate and up cannot alternate where {format_.block} elements "
                f"share a scale ({format_.name})"
            )
        offset = 0
        if segments:
            offset = _round_up(segments[-1].offset + segments[-1].nbytes, SEGMENT_ALIGNMENT)
        label = name if piece == VALUES else f"{name}.{piece}"
        segment = Segment(label, dtype, (parts * count, *width), offset)
        segments.append(segment)
        found[piece] = [
            Rows(segment, p, parts, count) if interleaved else Rows(segment, p * count, 1, count)
            for p in range(parts)
        ]
    return [
        MatrixLayout(
            format_,
            rows,
            cols,
            values=found[VALUES][p],
            scales=found[SCALES][p] if SCALES in found else None,
            zeros=found[ZEROS][p] if ZEROS in found else None,
            multiplier=found[MULTIPLIER][p] if MULTIPLIER in found else None,
            bias=found[BIAS][p] if BIAS in found else None,
        )
        for p in range(parts)
    ]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

"""The index of experts: which bytes of which tensors hold which piece of which expert.

An index is made from the table of families, or by a caller who knows the names, such as the
integration of a runtime. A store is made from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from moeinf.checkpoint.families import Address
from moeinf.checkpoint.formats import BIAS, PLAIN_FORMATS, VALUES, WeightFormat
from moeinf.checkpoint.headers import DTYPE_NAMES, TensorEntry
from moeinf.checkpoint.packed import PackedEntry
from moeinf.errors import CheckpointError
from moeinf.kernels.forms import ExpertForm


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of one tensor's bytes: a piece of one expert. `offset` counts from the tensor's start.

    `shape` is [rows, columns] of what is stored, or [rows] of a bias. `transposed`: the bytes lie
    column by column, and are turned on their way into a slot.
    """

    entry: TensorEntry
    offset: int
    shape: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def whole(cls, entry: TensorEntry) -> Slice:
        """All of a tensor that belongs to one expert."""
        return cls(entry, 0, entry.shape)

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes * math.prod(self.shape) // max(1, math.prod(self.entry.shape))

    def __str__(self) -> str:
        entry = self.entry
        return f"{entry.name} ({entry.path.name}: {entry.dtype} {list(self.shape)})"


Expert = Mapping[tuple[str, str], Slice]
"""By matrix (gate, up, down, or gate_up for both at once) and piece (values, scales, bias)."""

Index = Mapping[str, Sequence[Expert]]
"""By module path of the experts, in the order of layers: all experts in the router's order."""


def split_fused(entry: TensorEntry, num_experts: int, transposed: bool = False) -> list[Slice]:
    """The slices of a tensor [num_experts, ...], one for each expert."""
    if not entry.shape or entry.shape[0] != num_experts:
        raise CheckpointError(f"{entry}: config.json says there are {num_experts} experts")
    nbytes, rest = divmod(entry.nbytes, num_experts)
    if rest:
        raise CheckpointError(f"{entry}: its {entry.nbytes} bytes cannot be shared by its experts")
    shape = entry.shape[1:]
    if transposed and len(shape) == 2 and not isinstance(entry, PackedEntry):
        return [Slice(entry, e * nbytes, shape[::-1], True) for e in range(num_experts)]
    return [Slice(entry, e * nbytes, shape) for e in range(num_experts)]


def build_index(
    found: Iterable[tuple[Address, TensorEntry]], num_experts: int, transposed: bool = False
) -> Index:
    """The index of tensors that were found by their names.

    `transposed`: those of all experts are [experts, inputs, outputs].

    Raises:
        CheckpointError: two tensors for one piece, or more experts than configured.
    """
    layers: dict[int, tuple[str, list[dict[tuple[str, str], Slice]]]] = {}
    for address, entry in found:
        assert address.piece is not None
        if address.layer not in layers:
            layers[address.layer] = address.module, [{} for _ in range(num_experts)]
        module, experts = layers[address.layer]
        key = address.matrix, address.piece
        if address.expert is None:
            holders, slices = experts, split_fused(entry, num_experts, transposed)
        elif address.expert < num_experts:
            holders, slices = [experts[address.expert]], [Slice.whole(entry)]
        else:
            raise CheckpointError(
                f"{entry.path}: layer {address.layer} has an expert {address.expert}, config.json "
                f"says there are {num_experts}"
            )
        if address.module != module:
            raise CheckpointError(
                f"{entry.path}: {entry.name!r}: experts of layer {address.layer} are in "
                f"{module} too"
            )
        for holder, piece in zip(holders, slices, strict=True):
            if key in holder:
                raise CheckpointError(
                    f"{entry.path}: {entry.name!r} and {holder[key].entry.name!r} are both the "
                    f"{address.matrix} {address.piece} of experts in layer {address.layer}"
                )
            holder[key] = piece
    return {module: experts for _, (module, experts) in sorted(layers.items())}


def check_alike(index: Index, form: ExpertForm, path: Path) -> tuple[str, ...]:
    """Every layer has every expert, and all experts have the same pieces, dtypes and shapes.

    Returns the matrices that the tensors hold, in slot order.

    Raises:
        CheckpointError: an expert that is unlike the first one, or that the form does not describe.
    """
    names = {matrix for experts in index.values() for expert in experts for matrix, _ in expert}
    if not form.has_gate:
        matrices: tuple[str, ...] = ("gate", "down")
    elif "gate_up" in names:
        matrices = ("gate_up", "down")
    else:
        matrices = ("gate", "up", "down")
    first_module, first_layer = next(iter(index.items()), ("", ()))
    if not first_layer:
        raise CheckpointError(f"{path}: the index holds no experts")
    first, count = first_layer[0], len(first_layer)
    values = {(matrix, VALUES) for matrix in matrices}
    if values - first.keys():
        raise _unlike(f"{path}: {first_module}, expert 0", first, values)
    for matrix in matrices:
        format_of(first, matrix)
    wanted = set(values)
    if form.has_bias:
        wanted |= {(matrix, BIAS) for matrix in matrices}
    for module, experts in index.items():
        if len(experts) != count:
            raise CheckpointError(
                f"{path}: {module}: expected {count} experts, found {len(experts)}"
            )
        for number, expert in enumerate(experts):
            if expert.keys() != wanted:
                raise _unlike(f"{path}: {module}, expert {number}", expert, wanted)
            for key, piece in expert.items():
                _check_slice(piece, first[key])
    return matrices


def format_of(expert: Expert, matrix: str) -> WeightFormat:
    """The weight format whose dtypes the matrix has.

    Raises:
        CheckpointError: there is none.
    """
    values = expert[matrix, VALUES]
    if isinstance(values.entry, PackedEntry):
        return values.entry.format
    for row in PLAIN_FORMATS.values():
        if DTYPE_NAMES[row.values] == values.entry.dtype:
            return row
    names = ", ".join(row.name for row in PLAIN_FORMATS.values())
    raise CheckpointError(f"{values}: expected one of the weight formats {names}, or scales")


def piece_of(values: Slice, piece: str) -> Slice:
    """The scales or zero points that belong to the values of a packed matrix.

    Raises:
        CheckpointError: its rows begin within a block of rows that share their scales.
    """
    entry = values.entry
    assert isinstance(entry, PackedEntry) and entry.format.block is not None
    stored = entry.pieces[piece]
    high, wide = entry.format.block
    *_, rows, cols = entry.shape
    matrix, first = divmod(values.offset // entry.row_bytes(), rows)
    count = values.shape[0]
    if entry.stored and count != rows:
        raise CheckpointError(f"{values}: expected all {rows} rows, for it is stored by columns")
    if piece in entry.stored:
        nbytes = stored.nbytes // math.prod(stored.shape[:-2])
        return Slice(stored, matrix * nbytes, stored.shape[-2:])
    if first % high or (first + count < rows and count % high):
        raise CheckpointError(
            f"{values}: rows {first} to {first + count} do not fill blocks of {high} that share "
            f"scales in {stored}"
        )
    width = -(-cols // wide) if wide else 1
    begin = matrix * -(-rows // high) + first // high
    unit = stored.nbytes // math.prod(stored.shape)
    return Slice(stored, begin * width * unit, (-(-count // high), width))


def _check_slice(piece: Slice, first: Slice) -> None:
    """The slice is like that of the first expert, and lies within its tensor."""
    alike = piece.shape == first.shape and piece.transposed == first.transposed
    if not alike or piece.entry.dtype != first.entry.dtype:
        raise CheckpointError(f"{piece} differs from {first}; experts must be alike")
    end = piece.offset + piece.nbytes
    if not 0 <= piece.offset <= end <= piece.entry.nbytes:
        raise CheckpointError(
            f"{piece}: bytes {piece.offset} to {end} leave the tensor's {piece.entry.nbytes}"
        )
    if piece.offset * 8 % (piece.entry.bits or 8):
        raise CheckpointError(f"{piece}: byte {piece.offset} is inside an element")


def _unlike(where: str, expert: Expert, wanted: Set[tuple[str, str]]) -> CheckpointError:
    """What is missing in an expert, or what it has too much."""
    missing = sorted(f"{m} {p}" if p != VALUES else m for m, p in wanted - expert.keys())
    if missing:
        return CheckpointError(f"{where}: no tensor for its {' and '.join(missing)}")
    matrix, piece = min(expert.keys() - wanted)
    return CheckpointError(
        f"{where}: {expert[matrix, piece]} holds its {matrix} {piece}, expected none in experts "
        "of this form and format"
    )

"""The store: where all experts of a checkpoint can be read from.

Knows, for every (layer, expert), which byte ranges of which files make up its segments. Converts
and copies nothing: the cache reads those ranges straight into slots.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeinf import _core
from moeinf.checkpoint import config as configuration
from moeinf.checkpoint import memory
from moeinf.checkpoint.blocks import NUMBERS
from moeinf.checkpoint.copies import Copy, find_copies, paths_of
from moeinf.checkpoint.description import Described
from moeinf.checkpoint.extent import Extent
from moeinf.checkpoint.families import NAMINGS, family_of, find_experts
from moeinf.checkpoint.folder import Checkpoint, check_order, read_bytes, read_multipliers
from moeinf.checkpoint.formats import (
    BIAS,
    FORMATS,
    MULTIPLIER,
    SCALE_TYPES,
    SCALES,
    VALUES,
    ZEROS,
)
from moeinf.checkpoint.headers import DTYPE_NAMES, FileState, TensorEntry
from moeinf.checkpoint.held import hold_tensor
from moeinf.checkpoint.index import (
    Expert,
    Index,
    Slice,
    build_index,
    check_alike,
    format_of,
    piece_of,
)
from moeinf.checkpoint.layout import Formats, Layout, Segment
from moeinf.checkpoint.packed import PackedEntry
from moeinf.checkpoint.stored import Stored
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.kernels.forms import ExpertForm

FLOATS = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


SAMPLES = 8


class ExpertStore:
    """All experts of one checkpoint.

    Attributes:
        modules: path of the experts' module of each MoE layer; layers are counted from 0 here.
        num_experts: experts in each of them.
        top_k: experts a token is routed to; None where the caller does not know.
        form: what an expert computes.
        layout: the segments of an expert, such as `gate_up` [2I, H] and `down` [H, I], and its
            matrices.
    """

    also: Sequence[Path] = ()
    """Where copies of its files lie; see `open`. Looked for when `catalog` is first asked for."""
    _copies: Sequence[Copy] = ()

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: Index,
        *,
        form: ExpertForm,
        top_k: int | None,
        interleaved: bool = False,
    ):
        """A store of experts that the caller found: see `moeinf.checkpoint.index`.

        Args:
            index: every expert of every MoE layer.
            interleaved: rows of gate and up alternate in the tensors called gate_up.

        Raises:
            CheckpointError: experts that are not alike, or that the form does not describe; the
                message names file, tensor, expected and found.
        """
        from moeinf.kernels.gates import check_form  # imports Triton, 0.3 s: only with a store

        check_form(form)
        self.checkpoint = checkpoint
        self.form = form
        self.top_k = top_k
        self.modules = list(index)
        self._matrices = check_alike(index, form, checkpoint.path)
        self.num_experts = len(index[self.modules[0]])
        if top_k is not None and not 0 < top_k <= self.num_experts:
            raise CheckpointError(
                f"{checkpoint.config_file}: routes to {top_k} experts per token, there are "
                f"{self.num_experts}"
            )
        self._index = index
        self.layout = self._lay_out(interleaved)
        self._places = _places(self.layout, self._matrices)

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str] | Checkpoint,
        revision: str | None = None,
        *,
        also: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    ) -> ExpertStore:
        """Opens a Hugging Face checkpoint (safetensors, one file or many): see `Checkpoint.open`.

        Args:
            also: folders on other disks with copies of all its files, or of some. Each read goes to
                the disk that would end it first. If that fails, the read is repeated from another
                one. See `moeinf.checkpoint.copies` for what is compared.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or holds no experts named in a
                known way; the message names file, tensor, expected and found.
        """
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, revision)
        if checkpoint.gguf is not None:
            raise UnsupportedError(
                f"{checkpoint.path}: experts of a GGUF file are found with its model: moeinf.load"
            )
        config, file = checkpoint.text_config(), checkpoint.config_file
        found = find_experts(checkpoint.tensors.values(), configuration.num_layers(config, file))
        if not found:
            raise CheckpointError(
                f"{checkpoint.path}: no experts found in a {config.get('model_type', 'unnamed')!r} "
                f"checkpoint of {len(checkpoint.tensors)} tensors; known names are "
                + "; ".join(naming.name for naming in NAMINGS)
            )
        naming = found[0][0].naming
        family = family_of(config, file)
        store = cls(
            checkpoint,
            build_index(found, configuration.num_experts(config, file), family.transposed),
            form=family.form(config, file),
            top_k=configuration.top_k(config, file),
            interleaved=naming.interleaved or (naming.fused and family.interleaved),
        )
        store.also = paths_of(also)
        hidden = config.get("hidden_size", store.layout.hidden)
        if hidden != store.layout.hidden:
            down = store._index[store.modules[0]][0]["down", VALUES]
            raise CheckpointError(f"{down}: config.json says hidden_size is {hidden}")
        return store

    @classmethod
    def from_tensors(
        cls,
        layers: Mapping[int, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
        *,
        form: ExpertForm | None = None,
        formats: Formats | None = None,
        top_k: int | None = None,
        interleaved: bool = False,
        transposed: bool = False,
    ) -> ExpertStore:
        """A store of experts that the caller holds in RAM. They are read in place, and kept alive.

        The caller changes no byte of them while the store lives. The cache copies into its slots
        what it needs of them.

        Args:
            layers: for each MoE layer, by its number in the model, the tensors of its experts by
                name: gate_up [E, 2I, H], or gate and up [E, I, H] each, and down [E, H, I]; with
                ".scales", ".multiplier" and ".bias" behind the name where the form or the format
                has them (shapes: `WeightFormat.segments`). Each is a tensor, an array (numpy, or
                anything with its interface), raw memory as (address, shape, dtype), or a list of
                these, one for each expert. An expert's elements lie side by side.
            formats: how weights are stored: of all matrices; of gate and up, and of down; or of
                gate, of up and of down. Without it, what the dtypes say. Other dtypes of the same
                width pass as bytes. Gate and up of two formats are two tensors.
            top_k: experts a token is routed to, where known.
            interleaved: rows of gate and up alternate in gate_up; else gate comes first.
            transposed: gate_up is [E, H, 2I] and down [E, I, H].

        Raises:
            ValueError: tensors that are missing, left over, or do not fit together; the message
                names tensor, expected and found.
        """
        form = form or ExpertForm()
        held = memory.from_tensors(
            layers, form=form, formats=formats, interleaved=interleaved, transposed=transposed
        )
        return _MemoryStore(held, form, top_k)

    @classmethod
    def from_callback(
        cls,
        read: Callable[[int, int, str, memoryview], int],
        *,
        layers: int | Sequence[int],
        num_experts: int,
        hidden: int,
        intermediate: int,
        formats: Formats = FORMATS["bf16"],
        form: ExpertForm | None = None,
        top_k: int | None = None,
        interleaved: bool = False,
        bias: torch.dtype = torch.bfloat16,
    ) -> ExpertStore:
        """A store of experts that the caller's function writes into slots.

        Args:
            read: read(layer, expert, segment, destination) writes all bytes of a segment (see
                `layout`) into the memoryview, and returns their number. `layer` counts from 0.
                Threads of the cache call it, several at once. What it raises, and a short write,
                become a ReadError of the step that wanted the expert. Nothing may
                use the destination after the call.
            layers: how many MoE layers there are, or their numbers in the model.
            hidden, intermediate: H and I.
            bias: dtype of the biases, where the form has them.

        The other arguments and the errors are those of `from_tensors`.
        """
        form = form or ExpertForm()
        held = memory.from_callback(
            read,
            layers=layers,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
            form=form,
            formats=formats,
            interleaved=interleaved,
            bias=bias,
        )
        return _MemoryStore(held, form, top_k)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.modules)

    @property
    def layer_ids(self) -> list[int]:
        """The checkpoint's own number of each MoE layer: the last one in its module's path."""
        return [
            int(next(part for part in reversed(module.split(".")) if part.isdigit()))
            for module in self.modules
        ]

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all experts as they lie in the files."""
        return self.layout.nbytes * self.num_layers * self.num_experts

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all experts."""
        matrices = self.layout.named.values()
        expert = sum(m.rows * (m.cols + (m.bias is not None)) for m in matrices)
        return expert * self.num_layers * self.num_experts

    @property
    def fingerprint(self) -> str:
        """The same in every process for the same experts.

        Experts of the same sizes differ in it where some of their bytes do: it hashes what is
        where, and 64 bytes of as many as SAMPLES experts. Raises ReadError.
        """
        digest = hashlib.sha256(
            repr((self.modules, self.num_experts, self.form, self.layout.segments)).encode()
        )
        for layer in range(0, self.num_layers, -(-self.num_layers // SAMPLES)):
            one = self.extents(layer, layer % self.num_experts)[-1]
            middle = one.file_offset + one.nbytes // 2
            digest.update(read_bytes(one.entry, middle, min(64, one.nbytes // 2)).numpy().data)
        return f"experts-{digest.hexdigest()[:16]}"

    def tensor_names(self) -> set[str]:
        """The checkpoint's names of every tensor that belongs to an expert."""
        return {
            piece.entry.name
            for experts in self._index.values()
            for expert in experts
            for piece in expert.values()
        }

    def check_expert(self, layer: int, expert: int) -> None:
        """Raises IndexError where there is no such layer or expert."""
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"layer {layer}, expert {expert}: this store has {self.num_layers} MoE layers "
                f"of {self.num_experts} experts"
            )

    def slices(self, layer: int, expert: int) -> Expert:
        """The tensors, or the parts of tensors, that one expert lies in."""
        self.check_expert(layer, expert)
        return self._index[self.modules[layer]][expert]

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """The byte ranges that make up one expert, in slot order."""
        parts = self.slices(layer, expert)
        extents = []
        for segment, matrices, piece in self._places:
            slot_offset = segment.offset
            for matrix in matrices:
                if piece in (SCALES, ZEROS):
                    found = piece_of(parts[matrix, VALUES], piece)
                elif piece == MULTIPLIER:
                    found = self._multiplier(layer, expert, matrix)
                else:
                    found = parts[matrix, piece]
                extents.append(
                    Extent(
                        found.entry, found.entry.offset + found.offset, found.nbytes, slot_offset
                    )
                )
                slot_offset += segment.nbytes // len(matrices)
        return extents

    def _multiplier(self, layer: int, expert: int, matrix: str) -> Slice:
        place = 3 * (layer * self.num_experts + expert)
        place += ("gate", "up", "down").index(matrix.removesuffix("_up"))
        return Slice(self._multipliers, 4 * place, (2 if matrix == "gate_up" else 1,))

    @cached_property
    def _multipliers(self) -> TensorEntry:
        """The multipliers of gate, up and down of every expert, in memory.

        In the checkpoint each is a tensor of its own, that may divide. Here they are read like all
        other bytes of an expert, and cost no read from the disk.
        """
        shape = (self.num_layers, self.num_experts, 3)
        numbers, read = torch.ones(shape), dict[str, torch.Tensor]()
        for layer, module in enumerate(self.modules):
            for expert, parts in enumerate(self._index[module]):
                for matrix in self._matrices:
                    values = parts[matrix, VALUES]
                    entry = values.entry
                    if isinstance(entry, PackedEntry) and entry.format.multiplier:
                        if entry.name not in read:
                            read[entry.name] = read_multipliers(entry)
                        one = values.offset // (entry.nbytes // math.prod(entry.shape[:-2]))
                        own = read[entry.name].view(math.prod(entry.shape[:-2]), -1)[one]
                        if len(own) > 1 and matrix != "gate_up":
                            raise CheckpointError(f"{entry}: expected one number for each expert")
                        for place, name in enumerate(("gate", "up", "down")):
                            if name in matrix.split("_"):
                                numbers[layer, expert, place] = own[min(place, len(own) - 1)]
        return hold_tensor("multipliers", numbers)

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Reads one expert into fresh memory: its segments by name.

        The straight path, for inspection and reference; the cache has a faster one.

        Raises:
            IndexError: no such layer or expert.
            ReadError: the file is gone, short or unreadable, or holds NaN where no decoder has
                them.
        """
        slot = torch.empty(1, self.slot_bytes, dtype=torch.uint8)
        for extent in self.extents(layer, expert):
            end = extent.slot_offset + extent.nbytes
            slot[0, extent.slot_offset : end] = read_bytes(
                extent.entry, extent.file_offset, extent.nbytes
            )
        for offset, rows, cols, element in self._transposes():
            matrix = slot[0, offset : offset + rows * cols * element].view(rows, cols, element)
            matrix.view(cols, rows, element)[:] = matrix.transpose(0, 1).clone()
        for code, offset, rows, cols, bits, plus in self._recodes():
            raw = slot[0, offset : offset + rows * cols // (8 // bits if "zeros" in code else 1)]
            if code == "awq":
                raw = raw[: rows * cols // 2]
            new = Stored(code=code, bits=bits, plus=plus).read(raw.clone(), (), rows)
            slot[0, offset : offset + len(new)] = new
        found = {name: view[0] for name, view in self.layout.views(slot).items()}
        for segment in self.layout.segments:
            if "." not in segment.name:
                held = self.layout.held_by(segment)
                pieces = {VALUES: held.values, SCALES: held.scales, ZEROS: held.zeros}
                held.format.refuse(
                    {piece: found[rows.segment.name] for piece, rows in pieces.items() if rows},
                    f"{self.modules[layer]}, expert {expert}, {segment.name}",
                )
        return found

    def _transposes(self) -> list[tuple[int, int, int, int]]:
        """Where a slot's bytes are read column by column: offset, rows and columns as they are
        read, bytes of an element."""
        found = []
        for offset, segment, part, stored in self._pieces():
            if part.transposed:
                rows, cols = part.shape
                found.append((offset, cols, rows, segment.dtype.itemsize))
            elif stored.turned:
                _, _, piece = segment.name.partition(".")
                assert isinstance(part.entry, PackedEntry)
                rows, cols = part.entry.pieces[piece or VALUES].shape[-2:]
                found.append((offset, rows, cols, stored.turned))
        return found

    def _recodes(self) -> list[tuple[str, int, int, int, int, int]]:
        """What is written again in a slot: code, offset, rows and columns there, bits, plus."""
        found = []
        for offset, segment, part, stored in self._pieces():
            if stored.code:
                rows, cols = part.shape
                if segment.name.endswith(ZEROS):
                    cols = segment.shape[1]
                found.append((stored.code, offset, rows, cols, stored.bits, stored.plus))
        return found

    def _pieces(self) -> Iterator[tuple[int, Segment, Slice, Stored]]:
        """Of the first expert: what lies at which offset of a slot, and how files hold it. Scales
        and zero points come with the slice of their values."""
        first = self._index[self.modules[0]][0]
        for segment, matrices, piece in self._places:
            for i, matrix in enumerate(matrices):
                part = first.get((matrix, piece)) or first[matrix, VALUES]
                entry = part.entry
                stored = entry.stored.get(piece) if isinstance(entry, PackedEntry) else None
                offset = segment.offset + i * segment.nbytes // len(matrices)
                yield offset, segment, part, stored or Stored()

    def _checks(self) -> list[tuple[int, int, _core.ScaleType | None, bool, int]]:
        """Where a slot has numbers that must be finite: see WeightFormat.number_types. Or zero
        points (None) that are stored as bytes, and so could have more bits than their integers."""
        found: list[tuple[int, int, _core.ScaleType | None, bool, int]] = []
        coded = {offset for _, offset, *_ in self._recodes()}
        for segment in self.layout.segments:
            _, _, piece = segment.name.partition(".")
            held = self.layout.held_by(segment)
            types = held.format.number_types()
            if piece == ZEROS and held.format.pack == 2 and segment.offset not in coded:
                found.append((segment.offset, segment.nbytes, None, True, 1))
            if (piece or VALUES) in types:
                kind, negative = types[piece or VALUES]
                step = SCALE_TYPES[kind].itemsize
                found.append((segment.offset, segment.nbytes, _scale_type(kind), negative, step))
            for place, kind in () if piece else NUMBERS.get(held.format.name, ()):
                offset, nbytes = segment.offset + place, segment.nbytes - place
                found.append((offset, nbytes, _scale_type(kind), True, held.format.unit))
        return found

    def _palettes(self) -> list[tuple[int, int, int, int]]:
        """Where a slot has rows of bf16 in 12 bits: offset, bytes, bytes of a row, of its tail."""
        found = []
        for segment in self.layout.segments:
            tail = self.layout.held_by(segment).format.tail
            if tail and "." not in segment.name:
                found.append((segment.offset, segment.nbytes, segment.row_bytes, tail))
        return found

    @cached_property
    def catalog(self) -> _core.Catalog:
        """The same ranges in the form the C++ core reads."""
        paths: dict[FileState, int] = {}
        rows, tensors, checks, palettes = [], {}, self._checks(), self._palettes()
        self._check_groups()
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                extents = self.extents(layer, expert)
                rows.append(
                    [
                        (
                            paths.setdefault(extent.entry.file, len(paths)),
                            extent.file_offset,
                            extent.nbytes,
                            extent.slot_offset,
                        )
                        for extent in extents
                    ]
                )
                if checks or palettes:
                    for extent in extents:
                        entry = extent.entry
                        if isinstance(entry, PackedEntry):
                            entry = entry.pieces[VALUES]
                        tensors[paths[entry.file], entry.offset] = entry.name
        files = [(str(file.path), file.nbytes) for file in paths]
        places = np.array(rows, dtype=np.uint64)
        if self.also:
            runs = places.reshape(-1, 4)[:, :3]
            known = list(self.checkpoint.tensors.values())
            self._copies = find_copies(self.also, list(paths), runs, known)
        sources = {i: file.source for i, file in enumerate(paths) if file.source is not None}
        return _core.Catalog(
            self.num_layers,
            self.num_experts,
            self.slot_bytes,
            files,
            places,
            self._transposes(),
            checks,
            [(*place, name) for place, name in tensors.items()],
            sources,
            self._recodes(),
            [(one.of, one.place, str(one.file.path), None) for one in self._copies],
            palettes,
        )

    @cached_property
    def warned_of(self) -> set[str]:
        """Those of `paths` that have failed, and of which a warning was logged."""
        return set()

    @property
    def paths(self) -> list[str]:
        """Where its bytes are read from: its own path, then each of `also`."""
        return [str(self.checkpoint.path), *map(str, self.also)]

    def describe(self, path: str | os.PathLike[str]) -> None:
        """Writes where all experts lie and what they compute, for `moeinf_store_open` of moeinf.h.

        The text names the files by their paths, and is refused where one of them has changed.
        Raises UnsupportedError for experts in no file.
        """
        self._check_groups()
        self.check_unchanged()
        experts = [
            self.extents(layer, expert)
            for layer in range(self.num_layers)
            for expert in range(self.num_experts)
        ]
        described = Described(
            self.form, self.layout, self.num_layers, experts,
            self._transposes(), self._checks(), self._recodes(), self._palettes(),
        )  # fmt: skip
        text = "\n".join([*described.lines(), ""])
        Path(path).write_text(text, encoding="utf-8", errors="surrogateescape")

    def _check_groups(self) -> None:
        """Raises UnsupportedError for groups of columns in another order (desc_act)."""
        for experts in self._index.values():
            for expert in experts:
                for part in expert.values():
                    check_order(part.entry)

    def check_unchanged(self) -> None:
        """Raises ReadError if a file of experts is not what it was when the store was opened.

        A cache asks once its own descriptors are open. Later changes are seen through these.
        """
        for file in [*self._files, *(one.file for one in self._copies)]:
            file.check_path()

    @cached_property
    def _files(self) -> set[FileState]:
        return {
            piece.entry.file
            for experts in self._index.values()
            for expert in experts
            for piece in expert.values()
        }

    def _lay_out(self, interleaved: bool) -> Layout:
        """The layout that the form wants; the tensors of the first expert fit it."""
        first = self._index[self.modules[0]][0]
        down = first["down", VALUES]
        if len(down.shape) != 2 or 0 in down.shape:
            raise CheckpointError(f"{down}: expected 2 sizes above zero")
        gate = first[self._matrices[0], VALUES]
        if self._matrices[0] == "gate_up" and gate.shape[0] % 2:
            raise CheckpointError(f"{gate}: expected an even number of rows, of gate and of up")
        if interleaved and self._matrices[0] != "gate_up":
            raise CheckpointError(f"{gate}: expected gate and up in one tensor, row by row in turn")
        bias = torch.bfloat16
        if self.form.has_bias:
            stored = first["down", BIAS]
            if stored.entry.dtype not in FLOATS:
                raise CheckpointError(f"{stored}: expected one of {', '.join(FLOATS)}")
            bias = FLOATS[stored.entry.dtype]
        formats = tuple(format_of(first, matrix) for matrix in self._matrices)
        hidden, intermediate = down.shape
        try:
            layout = Layout.of(
                self.form, formats, hidden, intermediate, interleaved=interleaved, bias=bias
            )
        except ValueError as error:
            raise CheckpointError(f"{down}: {error}") from error
        for segment, matrices, piece in _places(layout, self._matrices):
            rows, *width = segment.shape
            expected = rows // len(matrices), *width
            for matrix in matrices:
                if piece == MULTIPLIER:
                    continue
                beside = piece in (SCALES, ZEROS)
                values = first[matrix, VALUES if beside else piece]
                found = piece_of(values, piece) if beside else values
                if beside and piece in getattr(values.entry, "stored", {}):
                    continue  # the shapes in the file were compared with those of the values
                packed = beside or isinstance(found.entry, PackedEntry)
                dtype = found.entry.dtype if packed else DTYPE_NAMES[segment.dtype]
                if piece == VALUES:  # in columns, packed or not
                    expected = expected[0], intermediate if matrix == "down" else hidden
                if (found.shape, found.entry.dtype) != (expected, dtype):
                    raise CheckpointError(
                        f"{found}: expected {dtype} {list(expected)}, to go with {down}"
                    )
        return layout


class _MemoryStore(ExpertStore):
    """Of experts in no file. Their owner keeps the bytes as they are."""

    def __init__(self, held: memory.Held, form: ExpertForm, top_k: int | None):
        from moeinf.kernels.gates import check_form

        check_form(form)
        self._held = held
        self.layout = held.layout
        self.form = form
        self.modules = list(held.places)
        self.num_experts = len(held.places[self.modules[0]])
        self.top_k = top_k
        if top_k is not None and not 0 < top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1 to {self.num_experts}, found {top_k}")

    @property
    def paths(self) -> list[str]:
        return ["memory"]

    def tensor_names(self) -> set[str]:
        return set()

    def extents(self, layer: int, expert: int) -> list[Extent]:
        self.check_expert(layer, expert)
        return self._held.places[self.modules[layer]][expert]

    def _transposes(self) -> list[tuple[int, int, int, int]]:
        return list(self._held.transposes)

    def _recodes(self) -> list[tuple[str, int, int, int, int, int]]:
        return []

    def _check_groups(self) -> None:
        """Columns have no order but their own."""

    def check_unchanged(self) -> None:
        """Nothing can be asked."""


def _scale_type(kind: str) -> _core.ScaleType:
    found: _core.ScaleType = getattr(_core.ScaleType, kind)
    return found


def _places(
    layout: Layout, matrices: tuple[str, ...]
) -> list[tuple[Segment, tuple[str, ...], str]]:
    """Each segment with the matrices that lie in it, one after another, and the piece of them."""
    places = []
    for segment in layout.segments:
        name, _, piece = segment.name.partition(".")
        held = (name,) if name in matrices else matrices[:-1]
        places.append((segment, held, piece or VALUES))
    return places

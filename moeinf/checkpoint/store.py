"""The store: where all experts of a checkpoint can be read from.

Knows, for every (layer, expert), which byte ranges of which files make up its segments. Converts
and copies nothing: the cache reads those ranges straight into slots.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeinf import _core
from moeinf.checkpoint.families import CONVENTIONS, ExpertTensors, find_experts
from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.formats import PLAIN_FORMATS
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.layout import Layout
from moeinf.errors import CheckpointError
from moeinf.kernels.forms import ExpertForm, Gate

# Configurations disagree on a name for the same number; the first one found counts.
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
ACTIVATION_KEYS = ("hidden_act", "hidden_activation")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one expert: where it lies in a file, and where in the slot it goes."""

    entry: TensorEntry
    offset: int  # bytes from the start of the file
    nbytes: int
    slot_offset: int


class ExpertStore:
    """All experts of one checkpoint.

    Attributes:
        num_layers: MoE layers; layers are counted from 0 among these.
        layer_ids: the checkpoint's own number of each MoE layer.
        num_experts: experts in each of them.
        top_k: experts a token is routed to.
        layout: the segments of an expert, `gate_up` [2I, H] and `down` [H, I], and its matrices.
        form: what an expert computes.
        activation: silu, gelu, gelu_tanh or relu.
    """

    def __init__(self, checkpoint: Checkpoint, experts: ExpertTensors):
        config = checkpoint.text_config()
        self.checkpoint = checkpoint
        self.layer_ids = sorted(experts.tensors)
        self.num_experts = _positive(config, NUM_EXPERTS_KEYS, checkpoint.path)
        self.top_k = _positive(config, TOP_K_KEYS, checkpoint.path)
        if self.top_k > self.num_experts:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: routes to {self.top_k} experts per token, "
                f"there are {self.num_experts}"
            )
        self.activation = _activation(config, checkpoint.path)
        self.form = ExpertForm(Gate(activation=self.activation))
        self._experts = experts
        self.layout = self._check()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Checkpoint) -> ExpertStore:
        """Opens a Hugging Face checkpoint folder (safetensors, one file or many).

        Raises:
            CheckpointError: the folder is incomplete or damaged, or holds no experts named in a
                known way; the message names file, tensor, expected and found.
        """
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        config = checkpoint.text_config()
        num_layers = _positive(config, ("num_hidden_layers", "num_layers"), checkpoint.path)
        experts = find_experts(checkpoint.tensors, num_layers=num_layers)
        if experts is None:
            raise CheckpointError(
                f"{checkpoint.path}: no experts found in a {config.get('model_type', 'unnamed')!r} "
                f"checkpoint of {len(checkpoint.tensors)} tensors; known names are "
                + "; ".join(convention.name for convention in CONVENTIONS)
            )
        return cls(checkpoint, experts)

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all experts as they lie in the files."""
        return self.layout.nbytes * self.num_layers * self.num_experts

    def tensor_names(self) -> set[str]:
        """The checkpoint's names of every tensor that belongs to an expert."""
        return {
            entry.name
            for layer in self._experts.tensors.values()
            for parts in layer.values()
            for entry in parts.values()
        }

    def pieces(self, layer: int, expert: int) -> list[Piece]:
        """The byte ranges that make up one expert, in slot order."""
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"layer {layer}, expert {expert}: this store has {self.num_layers} MoE layers "
                f"of {self.num_experts} experts"
            )
        fused = self._experts.convention.fused
        parts = self._experts.tensors[self.layer_ids[layer]][0 if fused else expert]
        pieces = []
        for segment in self.layout.segments:
            names = [segment.name] if segment.name in parts else ["gate", "up"]
            slot_offset = segment.offset
            for entry in (parts[name] for name in names):
                nbytes = entry.nbytes // self.num_experts if fused else entry.nbytes
                offset = entry.offset + (expert * nbytes if fused else 0)
                pieces.append(Piece(entry, offset, nbytes, slot_offset))
                slot_offset += nbytes
        return pieces

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Reads one expert into fresh memory: its segments by name.

        The straight path, for inspection and reference; the cache has a faster one.

        Raises:
            IndexError: no such layer or expert.
            ReadError: the file is gone, short or unreadable.
        """
        slot = torch.empty(1, self.slot_bytes, dtype=torch.uint8)
        for piece in self.pieces(layer, expert):
            entry = piece.entry
            part = TensorEntry(
                entry.name, entry.path, torch.uint8, (piece.nbytes,), piece.offset, piece.nbytes
            )
            slot[0, piece.slot_offset : piece.slot_offset + piece.nbytes] = read_tensor(part)
        return {name: view[0] for name, view in self.layout.views(slot).items()}

    @cached_property
    def catalog(self) -> _core.Catalog:
        """The same ranges in the form the C++ core reads."""
        paths: dict[Path, int] = {}
        rows = []
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                rows.append(
                    [
                        (
                            paths.setdefault(piece.entry.path, len(paths)),
                            piece.offset,
                            piece.nbytes,
                            piece.slot_offset,
                        )
                        for piece in self.pieces(layer, expert)
                    ]
                )
        files = [(str(path), path.stat().st_size) for path in paths]
        return _core.Catalog(
            self.num_layers,
            self.num_experts,
            self.slot_bytes,
            files,
            np.array(rows, dtype=np.uint64),
        )

    def _check(self) -> Layout:
        """Every layer has every part of every expert, all of one dtype and shape."""
        convention = self._experts.convention
        wanted = set(convention.parts.values())
        reference: dict[str, TensorEntry] | None = None
        for layer in self.layer_ids:
            found = self._experts.tensors[layer]
            count = 1 if convention.fused else self.num_experts
            surplus = sorted(set(found) - set(range(count)))
            if surplus:
                raise CheckpointError(
                    f"{self.checkpoint.path}: layer {layer} has an expert {surplus[0]}, "
                    f"config.json says there are {self.num_experts}"
                )
            for expert in range(count):
                parts = found.get(expert, {})
                missing = sorted(wanted - parts.keys())
                if missing:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: layer {layer}, expert {expert}: no tensor for "
                        f"its {' and '.join(missing)}"
                    )
                if reference is None:
                    reference = parts
                    self._check_shapes(parts)
                for part, entry in parts.items():
                    first = reference[part]
                    if (entry.dtype, entry.shape) != (first.dtype, first.shape):
                        raise CheckpointError(
                            f"{entry} differs from {first}; experts must be alike"
                        )
        assert reference is not None
        return self._build_layout(reference)

    def _check_shapes(self, parts: dict[str, TensorEntry]) -> None:
        down = parts["down"]
        rank = 3 if self._experts.convention.fused else 2
        if len(down.shape) != rank or 0 in down.shape:
            raise CheckpointError(f"{down}: expected {rank} sizes above zero")
        *lead, hidden, intermediate = down.shape
        if lead and lead[0] != self.num_experts:
            raise CheckpointError(f"{down}: config.json says there are {self.num_experts} experts")
        declared = self.checkpoint.text_config().get("hidden_size", hidden)
        if declared != hidden:
            raise CheckpointError(f"{down}: config.json says hidden_size is {declared}")
        for part, entry in parts.items():
            rows = {"gate": intermediate, "up": intermediate, "gate_up": 2 * intermediate}
            expected = (*lead, rows[part], hidden) if part in rows else down.shape
            if entry.shape != tuple(expected):
                raise CheckpointError(f"{entry}: expected {list(expected)}, to go with {down}")
            if entry.dtype not in PLAIN_FORMATS or entry.dtype != down.dtype:
                raise CheckpointError(
                    f"{entry}: expected bfloat16, float16 or float32, the same for every part"
                )

    def _build_layout(self, parts: dict[str, TensorEntry]) -> Layout:
        down = parts["down"]
        hidden, intermediate = down.shape[-2:]
        return Layout.of(self.form, PLAIN_FORMATS[down.dtype], hidden, intermediate)


def _positive(config: dict[str, Any], keys: tuple[str, ...], path: Path) -> int:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{path / 'config.json'}: {key} is {value!r}, expected > 0")
            return value
    raise CheckpointError(f"{path / 'config.json'}: none of {', '.join(keys)} is set")


def _activation(config: dict[str, Any], path: Path) -> str:
    name = next((config[key] for key in ACTIVATION_KEYS if config.get(key)), "silu")
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path / 'config.json'}: activation {name!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]

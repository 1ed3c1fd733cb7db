"""The model but for its experts: tensors that transformers loads, and matrices that stay packed.

Packed are the weights of ordinary linear layers, each of one packed matrix of the files. All others
are decoded when they are loaded: weights that transformers makes of several tensors or in another
order, those of embeddings, tied ones, and those of other classes of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moeinf.cache import budget
from moeinf.checkpoint.folder import read_pieces, read_tensor
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed import PackedEntry
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.experts.packed_linear import PackedForm, make_packed, packed_form
from moeinf.integrations.transformers.experts import leave_out_experts
from moeinf.integrations.transformers.families import adapt
from moeinf.integrations.transformers.plan import Plan, missing_tensors


@dataclass(frozen=True)
class Dense:
    """
    decoded  the tensors that transformers loads, by their names in `Plan.dense`
    packed   by path, the layers that stay packed: the entry of the weight, and its place in memory
    """

    decoded: Mapping[str, TensorEntry]
    packed: Mapping[str, tuple[PackedEntry, PackedForm]]

    def bytes_loaded_as(self, dtype: torch.dtype) -> int:
        """Bytes that all of them take while they are loaded."""
        packed = sum(form.nbytes for _, form in self.packed.values())
        return packed + budget.bytes_loaded_as(dtype, self.decoded.values())

    def leave_out_packed(self, model: torch.nn.Module) -> None:
        """Removes the weights: nothing is allocated, drawn or read for them."""
        for path in self.packed:
            layer: Any = model.get_submodule(path)
            layer.register_parameter("weight", None)
            layer._is_hf_initialized = True

    def fill_packed(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Reads the packed bytes. `dtype` is that of the weights where they are decoded.

        Raises:
            ReadError, CheckpointError, UnsupportedError: see `read_pieces`.
        """
        for path, (entry, form) in self.packed.items():
            parts = {piece: part[0] for piece, part in read_pieces(entry).items()}
            layer: Any = model.get_submodule(path)
            make_packed(layer, form, form.pack(parts), dtype)


def choose_dense(plan: Plan, device: str | torch.device | None, how: str = "auto") -> Dense:
    """As `dense=` of `moeinf.load` says; "auto" is packed on the CPU. Raises as `find_packed`."""
    if how == "packed" or (how == "auto" and _on_cpu(device)):
        return find_packed(plan, device)
    return Dense(plan.dense, {})


def _on_cpu(device: str | torch.device | None) -> bool:
    return str(device).partition(":")[0] == "cpu"


def find_packed(plan: Plan, device: str | torch.device | None) -> Dense:
    """The same with every layer packed that can be.

    Raises:
        UnsupportedError: a device without kernels for them; None are several devices.
    """
    if not _on_cpu(device):
        raise UnsupportedError(
            f"dense='packed' computes on the CPU, not on {device or 'several devices'}: give "
            "device='cpu' or dense='decoded'"
        )
    decoded, packed = dict(plan.dense), {}
    for path, entry in linear_layers(plan):
        if not isinstance(entry, PackedEntry):
            continue
        try:
            packed[path] = entry, packed_form(entry.format, *entry.shape)
        except ValueError:  # blocks or rows that the kernels do not have
            continue
        del decoded[plan.whole[f"{path}.weight"]]
    return Dense(decoded, packed)


def linear_layers(plan: Plan) -> Iterator[tuple[str, TensorEntry]]:
    """By path, the weights [outputs, inputs] of ordinary linear layers: each one tensor of the
    files, and of that layer alone."""
    model = plan.skeleton
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}
    owners = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name, key in plan.whole.items():
        path, _, last = name.rpartition(".")
        entry = plan.dense[key]
        if last != "weight" or len(entry.shape) != 2 or name in tied:
            continue
        layer = model.get_submodule(path)
        if type(layer) is torch.nn.Linear and owners[id(layer.weight)] == 1:
            yield path, entry


class _OnDemand:
    """A tensor that is read when indexed: what the library's loader does with each in turn."""

    def __init__(self, read: Callable[[], torch.Tensor]):
        self.read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()


def load_dense(
    base: type[PreTrainedModel],
    config: Any,
    plan: Plan,
    weights: Dense,
    dtype: torch.dtype,
) -> Any:
    """The model with everything but its experts, loaded by transformers but for packed weights.

    Raises:
        CheckpointError: a tensor that is missing or of another shape than the model's.
    """
    checkpoint = plan.stores[0].checkpoint
    state = {
        name: _OnDemand(plan.readers.get(name) or partial(read_tensor, entry))
        for name, entry in weights.decoded.items()
    }
    try:
        loaded: Any = _without_experts(base, weights).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            experts_implementation="eager",  # 5.0 checks it against a list of its own
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    except RuntimeError as error:  # an operation on tensors failed
        raise CheckpointError(f"{checkpoint.path}: transformers cannot load it: {error}") from error
    model, found = loaded
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"{checkpoint.path}: {name}: expected {list(expected)}, found {list(shape)}"
        )
    if found["missing_keys"]:
        raise missing_tensors(checkpoint, found["missing_keys"])
    weights.fill_packed(model, dtype)
    return model


def _without_experts(base: type[PreTrainedModel], weights: Dense) -> type[PreTrainedModel]:
    """A subclass of `base` whose expert parameters and packed weights are left out right after
    construction."""

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        adapt(self)
        leave_out_experts(self)
        weights.leave_out_packed(self)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})

"""What a model needs from a checkpoint: its experts as stores, and its other tensors.

Made from the headers and from the model on the meta device, before any tensor is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from moeinf.checkpoint.config import TOP_K_KEYS
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.index import Expert
from moeinf.checkpoint.packed import PackedEntry
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.integrations.transformers import gguf
from moeinf.integrations.transformers.experts import (
    experts_modules,
    find_experts,
    leave_out_experts,
    parameters_of,
)
from moeinf.integrations.transformers.families import adapt, check_served
from moeinf.integrations.transformers.families.adapter import Experts
from moeinf.integrations.transformers.form import form_of
from moeinf.integrations.transformers.models import build_skeleton
from moeinf.integrations.transformers.weights import Sources, Traced, find_sources, trace
from moeinf.kernels.forms import ExpertForm

INTEGERS = frozenset(("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"))
# Ends of names of tensors that other tensors cannot be read without.
SCALES = re.compile(r"(scale|scales|scale_inv|scale_2|absmax|zero_point|zeros|g_idx)$")


@dataclass(frozen=True)
class Plan:
    """What to load.

    Attributes:
        skeleton: the model on the meta device, without the parameters of experts.
        stores: the experts. Those of one store are alike: as many in each layer, of one form, one
            format and one size. `ExpertStore.modules` says which layers of the model they are of.
            The store with the most bytes comes first.
        dense: every other tensor that the model uses, by its name in the files.
        tied: experts modules that have the weights of another one, by path, and which that is.
        readers: how tensors of `dense` are read that are not as the model has them.
        whole: by path, the parameters that are one tensor of the files as it is: its name in
            `dense`.
    """

    skeleton: PreTrainedModel
    stores: list[ExpertStore]
    dense: dict[str, TensorEntry]
    tied: dict[str, str]
    readers: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


def make_plan(base: type[PreTrainedModel], config: Any, checkpoint: Checkpoint) -> Plan:
    """The plan for a model of the class `base`.

    Raises:
        CheckpointError: tensors that are missing, of a wrong shape, or useless without others.
        UnsupportedError: a model without experts, or with experts that cannot be served.
    """
    skeleton = build_skeleton(base, config, checkpoint)
    adapt(skeleton)
    modules = experts_modules(skeleton)
    if not modules:
        check_served(skeleton.config.model_type)
        raise UnsupportedError(
            f"{checkpoint.config_file}: {base.__name__} has no experts modules; moeinf serves "
            "models whose experts use transformers' experts interface"
        )
    if checkpoint.gguf is not None:
        return _plan_of_gguf(checkpoint, skeleton, modules)
    sources, unknown = find_sources(skeleton, checkpoint.tensors.values())
    shapes = {
        f"{path}.{name}": shape
        for path, module in modules.items()
        for name, shape in parameters_of(module).items()
    }
    for path, module in modules.items():
        for name in parameters_of(module):
            if module.is_transposed and _by_rows(sources.get(f"{path}.{name}")):
                experts, inputs, outputs = shapes[f"{path}.{name}"]
                shapes[f"{path}.{name}"] = (experts, outputs, inputs)
    traced: dict[str, Traced] = {}
    for name in shapes:
        if name in sources:
            traced |= trace(name, sources[name], shapes, skeleton.config)
    for one, other in skeleton.all_tied_weights_keys.items():
        for name, twin in ((one, other), (other, one)):
            if name in shapes and name not in traced and twin in traced:
                traced[name] = traced[twin]
    missing = [name for name in shapes if name not in traced]
    if missing:
        raise missing_tensors(checkpoint, missing)
    served = {entry.name for name in shapes if name in sources for entry in sources[name].all()}
    dense = {
        entry.name: entry
        for one in sources.values()
        for entry in one.all()
        if entry.name not in served
    }
    _check_unknown(skeleton, checkpoint, unknown, sources)
    _check_dense(skeleton, checkpoint, sources, shapes)
    tied = _tied(modules, traced)
    own = {path: module for path, module in modules.items() if path not in tied}
    forms: list[ExpertForm] = []
    found = {}
    for path, module in own.items():
        form = form_of(module, forms)
        mine = {name: traced[f"{path}.{name}"] for name in parameters_of(module)}
        found[path] = form, *find_experts(path, module, form, mine)
    stores = _stores(checkpoint, found, _top_k(own, skeleton.config))
    leave_out_experts(skeleton)
    whole = {
        path: one.all()[0].name
        for path, one in sources.items()
        if one.converter is None and path not in shapes
    }
    return Plan(skeleton, stores, dense, tied, whole=whole)


def _plan_of_gguf(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, modules: Mapping[str, Any]
) -> Plan:
    """Names and bytes are those of a GGUF file; the keys of `dense` are the model's names."""
    counts, served = {}, set()
    for path, module in modules.items():
        shapes = parameters_of(module)
        counts[path] = next(iter(shapes.values()))[0]
        served |= {f"{path}.{name}" for name in shapes}
    dense, unknown = gguf.find_dense(checkpoint, skeleton, served)
    tied: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    missing = skeleton.state_dict().keys() - dense.keys() - served - tied.keys()
    if missing:
        raise missing_tensors(checkpoint, missing)
    _check_unknown(skeleton, checkpoint, unknown, {})
    forms: list[ExpertForm] = []
    experts = gguf.find_experts(checkpoint, counts)
    found = {
        path: (form_of(module, forms), experts[path], False) for path, module in modules.items()
    }
    stores = _stores(checkpoint, found, _top_k(modules, skeleton.config))
    leave_out_experts(skeleton)
    entries = {name: one.entry for name, one in dense.items()}
    readers = {name: one.read for name, one in dense.items()}
    whole = {name: name for name, one in dense.items() if one.same}
    return Plan(skeleton, stores, entries, {}, readers, whole)


def _check_dense(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: Mapping[str, Sources],
    experts: Collection[str],
) -> None:
    """Every tensor of the model but those of experts is there, of its shape and of floats if it is.

    What an operation makes of several tensors is checked when it is loaded. Names floats that are
    wider than every model's.
    """
    there = {*sources, *experts} | {
        path.replace(one, other)
        for path, made in sources.items()
        if made.converter is not None
        for one in made.converter.target_patterns
        for other in made.converter.target_patterns
    }
    tied: dict[str, set[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(name)
    for alike in tied.values():
        there |= alike if alike & there else set()
    optional = [*(model._keys_to_ignore_on_load_missing or ())]
    missing = [
        name
        for name in model.state_dict()
        if name not in there and not any(re.search(one, name) for one in optional)
    ]
    if missing:
        raise missing_tensors(checkpoint, missing)
    for path, parameter in model.state_dict().items():
        if path in sources and path not in experts and sources[path].converter is None:
            entry = sources[path].all()[0]
            if entry.shape != tuple(parameter.shape):
                raise CheckpointError(f"{entry.path}: {entry}: expected {list(parameter.shape)}")
        for entry in sources[path].all() if path in sources else ():
            if parameter.is_floating_point() and entry.dtype in INTEGERS:
                raise CheckpointError(f"{entry.path}: {entry}: expected floating-point numbers")
            if entry.dtype == "F64":
                warnings.warn(f"{entry.path}: {entry}: loses precision", stacklevel=4)


def _tied(modules: Mapping[str, Any], traced: Mapping[str, Traced]) -> dict[str, str]:
    """Modules with the weights of an earlier one."""
    first: dict[tuple[int, ...], str] = {}
    tied = {}
    for path, module in modules.items():
        weights = tuple(id(traced[f"{path}.{name}"]) for name in parameters_of(module))
        if first.setdefault(weights, path) != path:
            tied[path] = first[weights]
    return tied


def _by_rows(sources: Sources | None) -> bool:
    """Whether a parameter is one packed tensor: those are by rows, also in transposed modules."""
    if sources is None or sources.converter is not None:
        return False
    return isinstance(sources.all()[0], PackedEntry)


def missing_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> CheckpointError:
    """The error for parameters of the model that no file has."""
    first, *more = sorted(names)
    return CheckpointError(
        f"{checkpoint.path}: no tensor for {first}{f' and {len(more)} more' if more else ''}, "
        "which the model needs"
    )


def _stores(
    checkpoint: Checkpoint,
    found: Mapping[str, tuple[ExpertForm, Sequence[Expert], bool]],
    top_k: int | None,
) -> list[ExpertStore]:
    """One store for the layers whose experts are alike: form, experts and order of rows by path."""
    groups: dict[Any, dict[str, Sequence[Expert]]] = {}
    for path, (form, experts, interleaved) in found.items():
        alike = (
            len(experts),
            form,
            interleaved,
            tuple((key, piece.shape, piece.entry.dtype) for key, piece in experts[0].items()),
        )
        groups.setdefault(alike, {})[path] = experts
    stores = [
        ExpertStore(checkpoint, index, form=form, top_k=top_k, interleaved=interleaved)
        for (_, form, interleaved, _), index in groups.items()
    ]
    return sorted(stores, key=lambda store: -store.nbytes)


def _top_k(modules: Mapping[str, Any], config: Any) -> int | None:
    """Experts that a token is routed to, where an adapter or the configuration says so."""
    for module in modules.values():
        if isinstance(module, Experts) and module.top_k is not None:
            return module.top_k
    text = config.get_text_config()
    for key in TOP_K_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    return None


def _check_unknown(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    unknown: Mapping[str, TensorEntry],
    sources: Mapping[str, Sources],
) -> None:
    """Names the tensors that the model has no use for, unless transformers declares them so."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    pattern = re.compile("|".join(f"({one})" for one in ignored))
    left = [entry for name, entry in unknown.items() if not pattern.search(name)]
    owners = {entry.name.rpartition(".")[0] for one in sources.values() for entry in one.all()}
    for entry in left:
        owner, _, last = entry.name.rpartition(".")
        if SCALES.search(last) and owner in owners:
            raise CheckpointError(
                f"{entry.path}: {entry}: the weights beside it are of a format that is not "
                "supported: expected no scales"
            )
    if left:
        names = ", ".join(entry.name for entry in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            f"{checkpoint.path}: {type(model).__name__} has no use for {names}{more}; not loaded",
            stacklevel=4,
        )

"""A served model as a whole model: saved with its experts, or refused where that cannot be.

Its experts lie in the files. What writes or changes a model through its parameters would leave them
out without a word. So the classes here name them, and refuse.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from moeinf.checkpoint.folder import Checkpoint, read_bytes
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed import PackedEntry
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.experts.packed_linear import packed_parameters
from moeinf.kernels.forms import ExpertForm

CHUNK = 16 << 20  # bytes that a save holds at a time


class NotCopied:
    """A base of the classes that hold a cache."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            f"{type(self).__name__}: a served model cannot be copied or pickled: load it again "
            "with moeinf.load, or write it with save_pretrained"
        )


class WholeModel(NotCopied):
    """A base of the classes of served models."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Like transformers', with the experts, byte by byte as the model reads them.

        They keep the names that they have in its files. An adapter is saved alone, as transformers
        does it.

        Raises:
            UnsupportedError: experts with scales, the folder that the model reads from, a
                distributed checkpoint, a state_dict of other tensors than the model's own, or
                `push_to_hub=True`.
            ReadError: an expert cannot be read; the folder keeps what was in it.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]
        if self._hf_peft_config_loaded:
            return save(
                save_directory,
                is_main_process,
                None if state_dict is None else _tensors(state_dict),
                push_to_hub,
                variant=variant,
                **options,
            )
        if push_to_hub:
            raise UnsupportedError("save_pretrained: push_to_hub=True: call model.push_to_hub")
        if options.get("distributed_checkpoint"):
            raise UnsupportedError("save_pretrained: a served model is saved by one process")
        files = [store.checkpoint for store in _stores(self)]
        if any(file.gguf is not None for file in files):
            raise UnsupportedError(
                f"save_pretrained: {files[0].path}: a GGUF file is no safetensors file; copy it"
            )
        own = _tensors(self.state_dict())
        dense = own if state_dict is None else _tensors(state_dict)
        if dense.keys() != own.keys():
            odd = min(dense.keys() ^ own.keys())
            raise UnsupportedError(
                f"save_pretrained: {odd}: expected the tensors of model.state_dict(), no other; "
                "the experts come from the files"
            )
        if not is_main_process:
            return None
        experts = {
            name: store.checkpoint.tensors[name]
            for store in _stores(self)
            for name in store.tensor_names()
        }
        packed = next((one for one in experts.values() if isinstance(one, PackedEntry)), None)
        if packed is not None:
            raise UnsupportedError(
                f"save_pretrained: {packed}: expected experts without scales; copy the files of "
                f"{packed.path.parent} to have them elsewhere"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for path in {entry.path for entry in experts.values()}:
            if any(one.parent.samefile(folder) for one in (path, path.resolve())):
                raise UnsupportedError(
                    f"{folder}: the model reads its experts from this folder: save it in another"
                )
        with TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            first, whole = Path(scratch, "dense"), Path(scratch, "whole")
            save(first, state_dict=dense, **options)
            whole.mkdir()
            tensors = Checkpoint.open(first).tensors
            if tensors.keys() & experts.keys():
                name = min(tensors.keys() & experts.keys())
                raise UnsupportedError(f"save_pretrained: {name} is a tensor of experts and others")
            _write_weights(whole, tensors | experts, max_shard_size, variant)
            _replace_weights(folder, whole, variant)
            shutil.copytree(
                first,
                folder,
                ignore=shutil.ignore_patterns("model*.safetensors*"),
                dirs_exist_ok=True,
            )
        return None

    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        """Like transformers', with the experts and packed layers."""
        dense: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if only_trainable:
            return dense
        return dense + packed_parameters(self) + sum(s.num_parameters for s in _stores(self))

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Like transformers'.

        Raises:
            UnsupportedError: the adapter has weights of experts.
        """
        found = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        for key in getattr(found, "unexpected_keys", None) or ():
            if any(f"{module}." in key for store in _stores(self) for module in store.modules):
                _delete_adapter(self, kwargs.get("adapter_name") or "default")
                refuse(key)
        return found


class WholeExperts(NotCopied):
    """A base of the classes of modules of experts: their parameters are named, and not there."""

    moeinf_parameters: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if value is None and name in self.moeinf_parameters:
            refuse(f"{type(self).__name__}.{name}")
        return value

    def named_parameters(
        self, prefix: str = "", *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What adapters look for. Those of a whole model are found without this function."""
        yield from super().named_parameters(prefix, *args, **kwargs)  # type: ignore[misc]
        for name in self.moeinf_parameters:
            nothing = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            yield f"{prefix}.{name}" if prefix else name, nothing

    def get_extra_state(self) -> ExpertsInFiles:
        return ExpertsInFiles()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, value in state_dict.items():
            if name.startswith(prefix) and not isinstance(value, ExpertsInFiles):
                refuse(name)


class ExpertsInFiles:
    """Stands in a state_dict for the experts of a module: whatever would write it is refused.

    Code that prints what a state_dict holds may look at it.
    """

    shape = torch.Size([0])
    dtype = torch.uint8
    device = torch.device("cpu")
    is_meta = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__reduce_ex__(0)

    def __deepcopy__(self, memo: Any) -> ExpertsInFiles:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "the state_dict of a served model has no experts: write it with model.save_pretrained"
        )


def refuse(name: str) -> NoReturn:
    raise UnsupportedError(
        f"{name}: the experts of a served model stay in its files: they cannot be replaced, "
        "adapted, trained, or computed by another implementation than 'moeinf'"
    )


def whole_model(base: type) -> type:
    """The class of served models of the class `base`."""
    return class_of(WholeModel, base)


def make_whole_experts(module: Any, form: ExpertForm) -> None:
    """Names the parameters that a module of experts of this form lacks."""
    names = ("gate_up_proj" if form.has_gate else "up_proj", "down_proj")
    biases = tuple(f"{name}_bias" for name in names) if form.has_bias else ()
    module.moeinf_parameters = names + biases
    module.__class__ = class_of(WholeExperts, type(module))


_classes: dict[tuple[type, type], type] = {}


def class_of(first: type, base: type) -> type:
    """A class of the name of `base`, of which `first` overrides members; one for each pair."""
    members = {"__module__": base.__module__}
    return _classes.setdefault((first, base), type(base.__name__, (first, base), members))


def _stores(model: Any) -> list[ExpertStore]:
    return [cache.store for cache in model.moeinf.caches]


def _delete_adapter(model: torch.nn.Module, name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in state_dict.items() if not isinstance(value, ExpertsInFiles)
    }


def _write_weights(
    folder: Path,
    tensors: Mapping[str, TensorEntry],
    max_shard_size: int | str,
    variant: str | None,
) -> None:
    """The shards, and their index where there is more than one."""
    variant = f".{variant}" if variant else ""
    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors, key=_natural)},
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=f"model{variant}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, [tensors[name] for name in names])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"model.safetensors.index{variant}.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: list[TensorEntry]) -> None:
    """Copies the bytes of tensors of other files, wide elements first, so that all are aligned."""
    entries = sorted(entries, key=lambda entry: -(entry.bits or 0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for entry in entries:
            for done in range(0, entry.nbytes, CHUNK):
                part = read_bytes(entry, entry.offset + done, min(CHUNK, entry.nbytes - done))
                file.write(part.numpy().data)


def _replace_weights(folder: Path, whole: Path, variant: str | None) -> None:
    """Moves the weights into `folder`, where none of an earlier save may be left."""
    variant = f".{variant}" if variant else ""
    old = re.compile(
        rf"model{re.escape(variant)}(-\d{{5}}-of-\d{{5}})?\.safetensors"
        rf"|model\.safetensors\.index{re.escape(variant)}\.json"
    )
    for path in folder.iterdir():
        if old.fullmatch(path.name):
            path.unlink()
    for path in whole.iterdir():
        path.replace(folder / path.name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

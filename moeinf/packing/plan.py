"""What a pack will be: its files, the place of every tensor, and its configuration."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moeinf.checkpoint.folder import Checkpoint, names_by_shard
from moeinf.checkpoint.headers import TensorEntry, read_header
from moeinf.checkpoint.packed_entry import PackedEntry, tensors_of
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.integrations.transformers.plan import Plan
from moeinf.packing.linear import QuantisedLinear, quantised_linear
from moeinf.packing.making import BLOCK
from moeinf.packing.palettes import (
    BF16_PALETTE,
    PaletteExpert,
    as_bf16,
    palette_config,
    palette_experts,
    summary,
)
from moeinf.packing.quantised import StoredExpert, quantised
from moeinf.packing.shards import Copied, Part, Shard, split, write_index
from moeinf.packing.targets import TARGETS, configuration

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth",
           ".gguf", ".h5", ".msgpack")  # fmt: skip


class PackPlan:
    """What is to be written, and from what."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stores: list[ExpertStore],
        shards: list[Shard],
        config: dict[str, Any] | None,
        raw: dict[str, TensorEntry],
        one_read: bool,
    ):
        self.checkpoint = checkpoint
        self.stores = stores
        self.shards = shards
        self.config = config  # None: the source's own file
        self.nbytes = sum(shard.nbytes for shard in shards)
        self.source_bytes = sum(entry.nbytes for entry in raw.values())
        self.files = sorted({(e.file.path.name, e.file.nbytes, e.file.modified_ns)
                             for e in raw.values()})  # fmt: skip
        parts = [part for shard in shards for part in shard.parts]
        experts = [part.nbytes for part in parts if isinstance(part, StoredExpert)]
        panels = [part.panel_bytes for part in parts if isinstance(part, QuantisedLinear)]
        self.largest = max([BLOCK, *experts, *panels])
        self.one_read = one_read
        in_rows = [part for part in parts if isinstance(part, PaletteExpert)]
        self.weights = summary(in_rows) if config and "quantization_config" in config else {}

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        format: str | None,
        dense: str | None,
        shard_bytes: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> PackPlan:
        """`progress`: called with (bytes read, bytes in all) where experts are read before."""
        raw = {
            name: entry
            for file in sorted(names_by_shard(checkpoint.path))
            for name, entry in read_header(checkpoint.path / file).items()
        }
        plan = _plan_of(checkpoint)
        stores = plan.stores
        linear: dict[str, QuantisedLinear] = {}
        plain = {store.layout.format_names for store in stores} == {format}
        if format is None or (plain and dense is None):
            experts: list[Part] = _as_they_are(stores, raw)
            used = {spec.name for part in experts for spec in part.specs}
            config = None
        else:
            every = [e for e in checkpoint.tensors.values() if isinstance(e, PackedEntry)]
            in_palettes = all(entry.format.tail for entry in every)
            packed = next(iter(every), None)
            if packed is not None and in_palettes and format == BF16_PALETTE:
                raise UnsupportedError(
                    f"{packed.path}: {packed}: is in this format already: leave the format out to "
                    "keep it"
                )
            if packed is not None and not (in_palettes and format == "bf16"):
                raise UnsupportedError(
                    f"{packed.path}: {packed}: is quantised already, and would lose twice: pack "
                    "the checkpoint that it was made of, or leave the format out to keep this one"
                )
            names = {name for store in stores for name in store.tensor_names()}
            used = {one.name for name in names for one in tensors_of(checkpoint.tensors[name])}
            if dense is not None:
                linear = quantised_linear(plan, TARGETS[dense])
                used |= {part.entry.name for part in linear.values()}
            config = dict(checkpoint.config)
            config.pop("quantization_config", None)
            others = sorted(
                name.removesuffix(".weight")
                for name, entry in raw.items()
                if name not in used and name.endswith(".weight") and len(entry.shape) == 2
            )
            stated: dict[str, Any] | None = None
            if packed is not None:
                experts = [*as_bf16(stores)]
            elif format == BF16_PALETTE:
                in_rows = palette_experts(stores, progress)
                experts, stated = [*in_rows], palette_config(in_rows)
            else:
                target = TARGETS[format]
                found = [one for store in stores for one in quantised(store, target)]
                experts = [*found]
                named = {
                    name: part.target
                    for path, part in linear.items()
                    for name in (path, part.base)  # of the model and of the file: they may differ
                }
                stated = configuration(found[0].target, others, named)
            if stated is not None:
                config["quantization_config"] = stated
        copied = [Copied((entry,)) for name, entry in raw.items() if name not in used]
        copied.sort(key=lambda part: -part.specs[0].width)
        shards = split((copied, [*linear.values()], experts), shard_bytes)
        whole = len(experts) == sum(store.num_layers * store.num_experts for store in stores)
        one_read = whole and all(
            shard.in_runs() for shard in shards if not isinstance(shard.parts[0], QuantisedLinear)
        )
        return cls(checkpoint, stores, shards, config, raw, one_read)

    @property
    def digest(self) -> str:
        """The same for the same files of the source and the same pack of them."""
        found = hashlib.sha256(repr((self.files, self.config)).encode())
        for shard in self.shards:
            found.update(shard.header)
        return found.hexdigest()

    def check_opens(self) -> None:
        """Opens what the pack will be, before anything is written.

        Raises UnsupportedError where it would not be served, or not with the same experts.
        """
        with TemporaryDirectory(prefix="moeinf-") as made:
            for shard in self.shards:
                shard.write_hole(Path(made))
            write_index(Path(made), self.shards)
            self.write_small_files(Path(made))
            try:
                stores = stores_of(Checkpoint.open(made))
            except (CheckpointError, UnsupportedError) as error:
                why = str(error).replace(f"{made}/", "").replace(f"{made}: ", "")
                raise UnsupportedError(
                    f"{self.checkpoint.path}: its experts cannot be stored so: {why}"
                ) from error
            kept = [{module: (s.num_experts, s.form) for s in some for module in s.modules}
                    for some in (self.stores, stores)]  # fmt: skip
            if kept[0] != kept[1]:
                raise UnsupportedError(
                    f"{self.checkpoint.path}: its experts cannot be stored so: other experts were "
                    "found in the pack"
                )

    def write_small_files(self, dest: Path) -> None:
        """Every other file of the source, config.json last: without it nothing opens the folder."""
        for file in sorted(self.checkpoint.path.iterdir()):
            kept = file.is_file() and not file.name.startswith(".")
            if kept and not file.name.endswith(WEIGHTS) and file.name != "config.json":
                shutil.copyfile(file, dest / file.name)
        config = self.checkpoint.config_file
        if self.config is None:
            shutil.copyfile(config, dest / config.name)
        else:
            text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
            (dest / config.name).write_text(text, encoding="utf-8")


def stores_of(checkpoint: Checkpoint) -> list[ExpertStore]:
    return _plan_of(checkpoint).stores


def _plan_of(checkpoint: Checkpoint) -> Plan:
    from moeinf.integrations.transformers.models import model_of
    from moeinf.integrations.transformers.plan import make_plan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that the model has no use for: they are copied
        base, config = model_of(checkpoint)
        return make_plan(base, config, checkpoint)


def _as_they_are(stores: Sequence[ExpertStore], raw: dict[str, TensorEntry]) -> list[Part]:
    """The tensors that experts are read from, in the order of slots; each tensor once."""
    seen: set[str] = set()
    parts: list[Part] = []
    for store in stores:
        for layer in range(store.num_layers):
            for expert in range(store.num_experts):
                names = {}
                for extent in store.extents(layer, expert):
                    entry = extent.entry
                    if isinstance(entry, PackedEntry):
                        entry = entry.pieces["values"]
                    if entry.name in raw and entry.name not in seen:
                        names[entry.name] = raw[entry.name]
                seen |= names.keys()
                if names:
                    parts.append(Copied(tuple(names.values())))
    return parts

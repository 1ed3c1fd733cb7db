"""GGUF files: the configuration, the tokenizer and the names, by transformers' own support of them.

Transformers decodes whole files. Here it decodes no expert: those are mapped to bytes of the file.
All other tensors are decoded by the rows of `FORMATS`, and then put into the model's order by what
transformers has for their architecture.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.import_utils import is_gguf_available

from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.formats import BIAS, FORMATS, VALUES
from moeinf.checkpoint.gguf import GgufFile
from moeinf.checkpoint.headers import DTYPES, TensorEntry
from moeinf.checkpoint.index import Expert, Slice, split_fused
from moeinf.checkpoint.packed import PackedEntry
from moeinf.errors import CheckpointError, UnsupportedError

EXPERTS = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<matrix>gate|up|down|gate_up)_exps\.(?P<piece>weight|bias)"
)
# Architecture of the file: the model type that transformers' older loader has for it.
OLDER = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
# What that loader leaves out: key of the file, and the name of configurations for it.
SIZES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
SCORES = {1: "softmax", 2: "sigmoid"}  # numbers of expert_gating_func


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration that a GGUF file describes.

    Raises:
        UnsupportedError: transformers, or this file, does not know the architecture.
        CheckpointError: a key is missing, or a value is refused.
    """
    file = _file(checkpoint)
    name = file.architecture
    newer = _newer()
    try:
        if name in newer:
            from transformers.integrations.gguf import get_gguf_config

            counts = {"tokenizer.ggml.tokens": len(file.metadata["tokenizer.ggml.tokens"])}
            values = get_gguf_config({**file.metadata, **counts}, tuple(file.tensors))
        elif name in OLDER:
            values = _older_config(file, OLDER[name])
        else:
            raise UnsupportedError(
                f"{file.path}: architecture {name!r}; moeinf serves the MoE architectures that "
                f"transformers reads from GGUF: {', '.join(sorted({*OLDER, *newer}))}"
            )
        return AutoConfig.for_model(**values)
    except UnsupportedError:
        raise
    except Exception as error:  # each check of a value raises a type of its own
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file.path}: architecture {name!r}: {what}") from error


def _file(checkpoint: Checkpoint) -> GgufFile:
    assert checkpoint.gguf is not None
    return checkpoint.gguf


def _newer() -> frozenset[str]:
    """The MoE architectures whose tensors transformers converts by rules."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # before 5.24
        return frozenset()
    return frozenset(name for name in GGUF_CONFIG_ARCHS if name.endswith("moe"))


def _older_config(file: GgufFile, kind: str) -> dict[str, Any]:
    from transformers.integrations import GGUF_CONFIG_MAPPING, ggml

    if kind not in GGUF_CONFIG_MAPPING:
        raise UnsupportedError(
            f"{file.path}: this transformers does not read {file.architecture!r} from GGUF"
        )

    def key(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{file.architecture}.{name}", default)

    known = AutoConfig.for_model(kind).to_dict()
    values: dict[str, Any] = {"model_type": kind, **ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(kind, {})}
    renamings: dict[str, str | None] = GGUF_CONFIG_MAPPING[kind]  # type: ignore[assignment]
    for name, renamed in renamings.items():
        if renamed is not None and key(name) is not None:
            values[renamed] = key(name)
    values |= {name: key(word) for word, name in SIZES.items() if name in known and key(word)}
    # Older files do not say how wide experts are. Their tensors do.
    width = "moe_intermediate_size" if "moe_intermediate_size" in known else "intermediate_size"
    for name, matrix in ((width, "gate_exps"), ("shared_expert_intermediate_size", "gate_shexp")):
        shapes = [one.shape for word, one in file.tensors.items() if f".ffn_{matrix}.w" in word]
        if name in known and shapes:
            values[name] = shapes[0][-2]
    if "scoring_func" in values:
        values["scoring_func"] = SCORES[values["scoring_func"]]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in values and tokens is not None:
        values["vocab_size"] = len(tokens)
    for name, word in (
        ("eos_token_id", "eos"),
        ("bos_token_id", "bos"),
        ("pad_token_id", "padding"),
    ):
        values[name] = file.metadata.get(f"tokenizer.ggml.{word}_token_id")
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["rope_parameters"] = _rope(file, key, known, values.pop("rope_theta", None))
    return values


def _rope(
    file: GgufFile, key: Callable[..., Any], known: Mapping[str, Any], theta: float | None
) -> dict[str, Any]:
    kind = key("rope.scaling.type", "none")
    found = dict(known.get("rope_parameters") or {}) if kind != "none" else {}
    if theta is not None:
        found["rope_theta"] = theta
    if kind == "none":
        return {**found, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{file.path}: rope.scaling.type is {kind!r}, expected linear, yarn")
    found |= {"rope_type": kind, "factor": float(key("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        original = key("rope.scaling.original_context_length")
        if original is not None:
            found["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            value = key(f"rope.scaling.yarn_{name}")
            if value is not None:
                found[name] = value
    return found


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes.

    Raises:
        CheckpointError: transformers cannot make it.
    """
    try:
        made = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # as many types as kinds of damage
        why = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: no tokenizer can be made: {why}") from error
    known: PreTrainedTokenizerBase = made
    return known


@dataclass(frozen=True)
class Converted:
    """One tensor of the model that is no expert's: the stored one, and what is made of it.

    same: nothing is, but another dtype.
    """

    entry: TensorEntry
    convert: Callable[[torch.Tensor], torch.Tensor]
    same: bool

    def read(self) -> torch.Tensor:
        return self.convert(read_tensor(self.entry))


def find_experts(checkpoint: Checkpoint, modules: Mapping[str, int]) -> dict[str, Sequence[Expert]]:
    """The experts of each module, by the slices of the file's tensors.

    `modules`: how many experts each has; the number in its path is the number of its block.
    """
    file = _file(checkpoint)
    layers: dict[int, dict[tuple[str, str], TensorEntry]] = {}
    for name, entry in file.tensors.items():
        found = EXPERTS.fullmatch(name)
        if found is not None:
            piece = VALUES if found["piece"] == "weight" else BIAS
            layers.setdefault(int(found["layer"]), {})[found["matrix"], piece] = entry
            _check_known(entry)
    experts: dict[str, Sequence[Expert]] = {}
    for module, count in modules.items():
        layer = int(next(part for part in module.split(".") if part.isdigit()))
        tensors = layers.get(layer, {})
        if not tensors:
            raise CheckpointError(
                f"{file.path}: no tensor for {module}: expected blk.{layer}.ffn_*_exps"
            )
        made: list[dict[tuple[str, str], Slice]] = [{} for _ in range(count)]
        for key, entry in tensors.items():
            for one, part in zip(made, split_fused(entry, count), strict=True):
                one[key] = part
        experts[module] = made
    return experts


def _check_known(entry: TensorEntry) -> None:
    if not isinstance(entry, PackedEntry) and entry.dtype not in DTYPES:
        names = ", ".join(name.upper() for name, row in FORMATS.items() if row.unit > 1)
        raise UnsupportedError(f"{entry.path}: {entry}: expected F32, F16, BF16 or one of {names}")


def find_dense(
    checkpoint: Checkpoint, skeleton: Any, served: set[str]
) -> tuple[dict[str, Converted], dict[str, TensorEntry]]:
    """The tensors of `skeleton` but the `served` ones, by their names there; and the tensors of the
    file that the model has no use for, by their own.

    Raises:
        UnsupportedError: a type that is not known, or the gguf package is not there.
    """
    file = _file(checkpoint)
    if file.architecture in _newer():
        found = dict(_by_rules(file, skeleton))
    else:
        found = dict(_by_names(file, skeleton))
    for one in found.values():
        _check_known(one.entry)
    used = {one.entry.name for one in found.values()}
    unknown = {
        name: entry
        for name, entry in file.tensors.items()
        if name not in used and not EXPERTS.fullmatch(name)
    }
    return {name: one for name, one in found.items() if name not in served}, unknown


def _by_names(file: GgufFile, skeleton: Any) -> Iterator[tuple[str, Converted]]:
    """Through the table of names of the gguf package, which transformers' older loader uses."""
    if not is_gguf_available():
        raise UnsupportedError(
            f"{file.path}: GGUF files need the gguf package: pip install 'moeinf[gguf]'"
        )
    from transformers import modeling_gguf_pytorch_utils as loader

    processor = loader.TENSOR_PROCESSORS.get(file.architecture, loader.TensorProcessor)(
        config=skeleton.config.to_dict()
    )
    names = loader.get_gguf_hf_weights_map(skeleton, processor)

    def process(name: str, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        made = processor.process(
            weights=weights, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
        return made.weights  # type: ignore[no-any-return]

    def convert_as(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda stored: torch.as_tensor(process(name, stored.float().numpy()))

    for name, path in names.items():
        # Where the model has a bare parameter, the file's name still ends with .weight.
        entry = file.tensors.get(name) or file.tensors.get(f"{name}.weight")
        if entry is not None and not EXPERTS.fullmatch(entry.name):
            untouched = np.empty(entry.shape, np.float32)
            same = process(entry.name, untouched) is untouched
            yield path, Converted(entry, convert_as(entry.name), same)


def _by_rules(file: GgufFile, skeleton: Any) -> Iterator[tuple[str, Converted]]:
    """Through the conversions that newer versions of transformers have."""
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    mapping = copy.deepcopy(get_gguf_conversion_mapping(file.architecture, skeleton.config))
    names = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parameters = skeleton.state_dict()

    def convert_by(one: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def convert(tensor: torch.Tensor) -> torch.Tensor:
            value = {one.source_patterns[0]: [tensor]}
            for operation in one.operations:
                value = operation.convert(
                    value, source_patterns=one.source_patterns,
                    target_patterns=one.target_patterns, config=skeleton.config,
                )  # fmt: skip
            (made,) = value.values()
            result: torch.Tensor = made[0] if isinstance(made, list) else made
            return result

        return convert

    for name, entry in file.tensors.items():
        if not EXPERTS.fullmatch(name):
            path, pattern = rename_source_key(name, names, converters)
            if path in parameters:
                same: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous
                how = convert_by(by_pattern[pattern]) if pattern else same
                yield path, Converted(entry, how, how is same)

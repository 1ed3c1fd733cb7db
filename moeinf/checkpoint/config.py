"""What `config.json` says about experts. Configurations have several names for one number.

In each list of keys the first one that is set counts.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError, UnsupportedError

Config = dict[str, Any]

NUM_LAYERS_KEYS = ("num_hidden_layers", "num_layers")
STACK_KEYS = (*NUM_LAYERS_KEYS, "n_layers", "encoder_layers", "decoder_layers", "depth")
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
ACTIVATION_KEYS = ("hidden_act", "hidden_activation")
# Of quantization_config; auto-round where its tensors are those of GPTQ or AWQ.
METHODS = ("fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors", "gptq", "awq", "auto-round")
BF16_PALETTE = "bf16-palette"  # a format of this library, of no method: bf16 in 12 bits
ACTIVATIONS = {  # transformers' name: ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def num_layers(config: Config, file: Path) -> int:
    """Layers of the model, dense ones among them."""
    return _count(config, NUM_LAYERS_KEYS, file)


def num_experts(config: Config, file: Path) -> int:
    """Routed experts in each MoE layer."""
    return _count(config, NUM_EXPERTS_KEYS, file)


def top_k(config: Config, file: Path) -> int:
    """Experts that a token is routed to."""
    return _count(config, TOP_K_KEYS, file)


def activation(config: Config, file: Path) -> str:
    """One of `kernels.gates.ACTIVATIONS`."""
    name = next((config[key] for key in ACTIVATION_KEYS if config.get(key)), "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(f"{file}: activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def positive_number(config: Config, key: str, default: float, file: Path) -> float:
    """A constant of a gate function; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a number > 0")
    return float(value)


def check_counts(config: Config, tensors: Collection[TensorEntry], file: Path) -> None:
    """Raises CheckpointError for more layers or experts than the tensors can be of.

    A model that is made of such a configuration would take all memory.
    """
    most_layers = len(tensors)
    rows = [entry.shape[0] for entry in tensors if entry.shape and entry.nbytes]
    most_experts = max([most_layers, *rows])
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, tensors, file)
        most = most_layers if key in STACK_KEYS else most_experts
        if (
            key in STACK_KEYS + NUM_EXPERTS_KEYS
            and isinstance(value, int | float)
            and not value <= most
        ):
            raise CheckpointError(
                f"{file}: {key} is {value!r}: expected at most {most}, for the files have "
                f"{len(tensors)} tensors"
            )


def quantization(config: Config, file: Path) -> Config:
    """The `quantization_config` of the model or of its language model; empty where there is none.

    Raises UnsupportedError for a method that no weight format has.
    """
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found
            if not isinstance(found, dict) or not (method in METHODS or in_palettes(found)):
                raise UnsupportedError(
                    f"{file}: quantization_config says that weights are stored as {method!r}; "
                    f"supported are {', '.join(METHODS)}"
                )
            return found
    return {}


def in_palettes(stated: Config) -> bool:
    return "quant_method" not in stated and stated.get("format") == BF16_PALETTE


def _count(config: Config, keys: tuple[str, ...], file: Path) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one number for each layer
        if value is not None:
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{file}: {key} is {value!r}, expected > 0")
            return value
    raise CheckpointError(f"{file}: none of {', '.join(keys)} is set")

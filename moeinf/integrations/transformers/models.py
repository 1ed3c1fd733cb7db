"""Which class of transformers a checkpoint is a model of, and its configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import CONFIG_MAPPING, modeling_auto
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import CheckpointError
from moeinf.integrations.transformers import gguf

# Of activations: what the kernels of experts take.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Where a class is looked for if the checkpoint names none that fits its configuration: the first
# mapping that knows the configuration counts.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


def model_of(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], Any]:
    """The class of the model, and the configuration that it takes.

    Raises:
        CheckpointError: transformers does not know the model, or refuses a value.
    """
    config = read_config(checkpoint)
    if checkpoint.trust_remote_code:
        for auto, name in (getattr(config, "auto_map", None) or {}).items():
            if auto.startswith("AutoModel"):
                return _class_in_folder(name, checkpoint), config
    return model_class(config, checkpoint)


def _class_in_folder(name: str, checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """A class of the code that comes with the checkpoint."""
    try:
        found: Any = get_class_from_dynamic_module(name, checkpoint.path)
        return add_generation_mixin_to_remote_model(found)  # type: ignore[no-any-return]
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.config_file}: auto_map names {name}, which fails: "
            f"{in_words(error, checkpoint.config)}"
        ) from error


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration object, with the defaults of its class.

    Raises:
        CheckpointError: transformers does not know the model, or refuses a value.
    """
    if checkpoint.gguf is not None:
        return gguf.read_config(checkpoint)
    config, file = checkpoint.config, checkpoint.config_file
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: model_type is {kind!r}, expected a name")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: architectures is {names!r}, expected a list of names")
    for part in (config, checkpoint.text_config()):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if name is not None and not isinstance(getattr(torch, str(name), None), torch.dtype):
                raise CheckpointError(f"{file}: {key} is {name!r}, which is no dtype of torch")
    own = isinstance(config.get("auto_map"), dict)
    if kind not in CONFIG_MAPPING and not (own and checkpoint.trust_remote_code):
        code = "; to run code that comes with it: trust_remote_code=True" if own else ""
        raise CheckpointError(
            f"{file}: transformers refuses model_type {kind!r}: {transformers.__version__} does "
            f"not know it{code}"
        )
    try:
        loaded = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=checkpoint.trust_remote_code
        )
        # The checkpoint's entries say how they are stored. Transformers would build modules of its
        # own, or refuse what it does not know.
        for part in (loaded, loaded.get_text_config()):
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        return loaded
    except Exception as error:  # each check of a value raises a type of its own
        raise CheckpointError(
            f"{file}: transformers refuses model_type {kind!r}: {in_words(error, config)}"
        ) from error


def build_skeleton(base: type[PreTrainedModel], config: Any, checkpoint: Checkpoint) -> Any:
    """The model on the meta device.

    Raises:
        CheckpointError: a value of the configuration is one that the class cannot use.
    """
    try:
        with torch.device("meta"):
            return base(copy.deepcopy(config))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.config_file}: no {base.__name__} can be made of it: "
            f"{in_words(error, checkpoint.config)}"
        ) from error


def in_words(error: Exception, config: Any) -> str:
    """The message of an error. A KeyError says no more than a value: then also where it stands."""
    if isinstance(error, KeyError) and error.args:
        where = _path_of(error.args[0], config)
        return f"{where} is {error.args[0]!r}, which is not known" if where else str(error)
    return " ".join(str(error).split()) or type(error).__name__


def _path_of(value: Any, config: Any) -> str:
    """The keys that lead to a value, as "rope_scaling.type"; empty where it does not occur."""
    items = config.items() if isinstance(config, dict) else ()
    for key, found in items:
        if isinstance(found, str) and found == value:
            return str(key)
        if inner := _path_of(value, found):
            return f"{key}.{inner}"
    return ""


def model_class(config: Any, checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], Any]:
    """The class that `architectures` names, or else the one that transformers has for the
    configuration; and the part of the configuration that this class takes.

    Raises:
        CheckpointError: there is none.
    """
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None)
        part = _part_for(named, config)
        if part is not None:
            return named, part
    for name in MAPPINGS:
        mapping = getattr(modeling_auto, name, {})
        if type(config) in mapping:
            known = mapping[type(config)]
            part = _part_for(known, config)
            if part is not None:
                return known, part
    raise CheckpointError(
        f"{checkpoint.config_file}: this transformers ({transformers.__version__}) has no model "
        f"class for model_type {config.model_type!r}"
    )


def _part_for(found: Any, config: Any) -> Any:
    """What `found` is built from: the configuration, its text part, or None where neither fits."""
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return None
    wanted = found.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    text = config.get_text_config()
    if not isinstance(text, wanted):
        return None
    return text

"""Which class of transformers a checkpoint is a model of, and its configuration."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import CheckpointError

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


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration object, with the defaults of its class.

    Raises:
        CheckpointError: transformers does not know the model, or refuses a value.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.path)
    except (ValueError, KeyError) as error:
        kind = checkpoint.config.get("model_type")
        raise CheckpointError(
            f"{checkpoint.config_file}: transformers does not know model_type {kind!r}: {error}"
        ) from error


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
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return text

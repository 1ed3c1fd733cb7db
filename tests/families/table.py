"""Which families of the installed transformers are served: `python tests/families/table.py`.

Writes docs/families.md. The lists are those that the tests of this folder go by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tiny import families, model_types, tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
from moeinf.integrations.transformers.experts import experts_modules
from moeinf.integrations.transformers.families import ADAPTERS, NOT_SERVED
from moeinf.integrations.transformers.models import model_class

FILE = Path(__file__).parents[2] / "docs" / "families.md"

# Model types without a forward pass of the whole model, and what their own tests compare.
BY_ITSELF = {"qwen3_omni_moe": "thinker and talker: the text and the sound that they generate"}

# Model types whose tokens are not compared, and why.
NOT_GENERATED = {
    "diffusion_gemma": "needs a sampler that the published checkpoint describes",
    "qwen3_omni_moe_thinker": "needs ids of tokens that the whole model's configuration has",
}

WHERE: Any = SimpleNamespace(config_file="config.json")


def tried() -> Iterator[tuple[str, str, Any]]:
    """Family, model type and class of each model that has experts; each class once."""
    for family in families():
        classes = set()
        for name in model_types(family):
            if name in BY_ITSELF:
                continue
            config = CONFIG_MAPPING[name]
            try:
                base, part = model_class(config(**tiny(config)), WHERE)
            except moeinf.CheckpointError:  # a part that is no model of its own
                continue
            with torch.device("meta"):
                model = base(part)
            if base not in classes and experts_modules(model):
                classes.add(base)
                yield family, name, base


def generates_text(model_type: str, base: Any) -> bool:
    """Whether the tokens of a model are compared."""
    return base.can_generate() and model_type not in NOT_GENERATED


def first_line() -> str:
    """The versions that a table is of."""
    return f"Made by `make families` with transformers {transformers.__version__}.\n"


def table(found: list[tuple[str, str, Any]]) -> str:
    """The text of docs/families.md."""
    lines = [
        first_line(),
        "# Families that are served",
        "A test makes a tiny random checkpoint of each class below. Its logits in float32 equal",
        "those of transformers' eager experts to 1e-4, and to the bit with two slots and with all.",
        "Where it says so, four greedy tokens of two texts are equal.",
        "No published checkpoint is run by this test.\n",
        "| family | model type | class | tokens compared |",
        "|---|---|---|---|",
    ]
    for family, name, base in found:
        generates = "yes" if generates_text(name, base) else "no"
        lines.append(f"| {family} | {name} | {base.__name__} | {generates} |")
    lines += [
        "",
        "Outside transformers' experts interface, each by an adapter, with tests of its own:\n",
    ]
    lines += ["| family | class that is replaced |", "|---|---|"]
    for replaced, adapter in ADAPTERS.items():
        lines.append(f"| {adapter.__module__.rpartition('.')[2]} | {replaced} |")
    lines += ["", "Without a forward pass of the whole model, with tests of their own:\n"]
    lines += ["| model type | what is compared |", "|---|---|"]
    lines += [f"| {name} | {what} |" for name, what in BY_ITSELF.items()]
    lines += ["", "# Not served", "| family | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in sorted(NOT_SERVED.items())]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    FILE.write_text(table(list(tried())), "utf-8")

"""Which families of the installed transformers are served: `python tests/families/table.py`.

Writes docs/families.md. The lists here are those that the tests of this folder go by.
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
from moeinf.integrations.transformers.models import model_class

FILE = Path(__file__).parents[2] / "docs" / "families.md"

# Families with the experts interface that are not served, and why.
NOT_SERVED: dict[str, str] = {}

# Model types of served families that are not tried, and why.
NOT_TRIED = {
    "qwen3_omni_moe": "thinker and talker together have no forward pass; the thinker is tried",
}

WHERE: Any = SimpleNamespace(config_file="config.json")


def tried() -> Iterator[tuple[str, str, Any]]:
    """Family, model type and class of each model that has experts; each class once."""
    for family in families():
        classes = set()
        for name in model_types(family):
            if name in NOT_TRIED:
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


def first_line() -> str:
    """The versions that a table is of."""
    return f"Made by `make families` with transformers {transformers.__version__}.\n"


def table(found: list[tuple[str, str, Any]]) -> str:
    """The text of docs/families.md."""
    lines = [
        first_line(),
        "# Families that are served",
        "A test makes a tiny random checkpoint of each class below. Its logits in float32 equal those of",
        "transformers' eager experts to 1e-4, and are equal to the bit with two slots and with all. Where",
        "the class generates, greedy tokens are equal. No published checkpoint is run by this test.\n",
        "| family | model type | class | tokens compared |",
        "|---|---|---|---|",
    ]
    for family, name, base in found:
        generates = "yes" if base.can_generate() else "no"
        lines.append(f"| {family} | {name} | {base.__name__} | {generates} |")
    lines += ["", "# Not served", "| family or model type | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in sorted((NOT_SERVED | NOT_TRIED).items())]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    FILE.write_text(table(list(tried())), "utf-8")

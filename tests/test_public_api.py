"""What other programs import: a change of it needs a new version of the package."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import torch

import moeinf

STATED = Path(__file__).with_name("public_api.txt")
# Parameters of a data class are its fields; of an exception there is nothing to say.
OPERATORS = ("fused_experts", "fused_experts_out")


def lines_of(name: str, value: Any) -> list[str]:
    if inspect.isclass(value) and issubclass(value, Exception):
        return [f"{name}: {value.__mro__[1].__name__}"]
    if inspect.isclass(value):
        members = [f"{name}{signature_of(value)}"]
        for member, one in sorted(vars(value).items()):
            if member.startswith("_") or member in getattr(value, "__dataclass_fields__", ()):
                continue
            if isinstance(one, (classmethod, staticmethod)):
                one = one.__func__
            shown = signature_of(one) if inspect.isfunction(one) else ""
            members.append(f"{name}.{member}{shown}")
        return members
    if inspect.isfunction(value):
        return [f"{name}{signature_of(value)}"]
    return [f"{name}: {type(value).__name__} {' '.join(value)}"]


def signature_of(value: Any) -> str:
    """Names, kinds and defaults: annotations may become better without a new version."""
    if dataclasses.is_dataclass(value):
        shown = [field.name for field in dataclasses.fields(value) if field.init]
        return f"({', '.join(shown)})"
    found = inspect.signature(value)
    without = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    text = str(found.replace(parameters=without, return_annotation=inspect.Signature.empty))
    return re.sub(r"WeightFormat\(name='(\w+)'.*?decode=[^)]*\)+", r"FORMATS['\1']", text)


def public_api() -> str:
    lines = [line for name in moeinf.__all__ for line in lines_of(name, getattr(moeinf, name))]
    lines += [str(getattr(torch.ops.moeinf, name).default._schema) for name in OPERATORS]
    return "\n".join(lines) + "\n"


def version_of_the_package() -> str:
    project = STATED.parent.parent / "pyproject.toml"
    found = re.search(r'^version = "(.*)"$', project.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_public_api_is_that_of_its_version() -> None:
    version, _, stated = STATED.read_text().partition("\n")
    found = public_api()
    assert found == stated, (
        "names, signatures or defaults changed: raise the version in pyproject.toml (minor for "
        "what is added, major for what breaks callers), then run `python tests/test_public_api.py`"
    )
    assert version == version_of_the_package()


if __name__ == "__main__":
    STATED.write_text(f"{version_of_the_package()}\n{public_api()}")

"""Writes moeinf/_core.pyi, the types of the compiled module, from the module as it was built.

python -m tools.stubs            writes the file
python -m tools.stubs --check    fails where the file differs from what would be written
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "moeinf" / "_core.pyi"
HEAD = "# Written by `make stubs` from the compiled module: change csrc/bindings, not this file.\n"
# pybind11 accepts every object that converts itself to a number. Callers here pass numbers alone.
NUMBERS = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
}


def generate() -> str:
    """The text of the stub. Fails where a signature names a type that Python does not know."""
    with tempfile.TemporaryDirectory() as folder:
        enums = ["--enum-class-locations", r"\w+:moeinf._core"]
        command = ["pybind11_stubgen", "moeinf._core", "--exit-code", *enums, "-o", folder]
        run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{run.stdout}{run.stderr}csrc/bindings: a signature is not written in Python")
        text = (Path(folder) / "moeinf" / "_core.pyi").read_text(encoding="utf-8")
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not _is_list_of_names(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "__members__" in ast.unparse(node):
            node.body = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            _wrap_docstring(node)
        if isinstance(node, ast.FunctionDef):
            _complete_types(node.args)
    text = ast.unparse(tree)
    for long, short in NUMBERS.items():
        text = text.replace(long, short)
    for arguments in (["check", "--fix", "--select", "I,F401,UP", "-"], ["format", "-"]):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--quiet", "--stdin-filename", STUB],
            input=text, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return HEAD + text


def _complete_types(arguments: ast.arguments) -> None:
    """pybind11 leaves `*args` without a type, and None out of the type of a nullable pointer."""
    if arguments.vararg is not None:
        arguments.vararg.annotation = ast.parse("typing.Any", mode="eval").body
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = zip(positional + arguments.kwonlyargs, defaults + arguments.kw_defaults, strict=True)
    for argument, default in pairs:
        if isinstance(default, ast.Constant) and default.value is None and argument.annotation:
            text = ast.unparse(argument.annotation)
            if text != "typing.Any" and not text.endswith("| None"):
                argument.annotation = ast.parse(f"{text} | None", mode="eval").body


def _wrap_docstring(node: ast.ClassDef | ast.FunctionDef) -> None:
    if text := ast.get_docstring(node):
        docstring = node.body[0]
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
        indent = 4 if node.col_offset == 0 else 8
        docstring.value.value = textwrap.fill(
            f'"""{" ".join(text.split())}"""', width=100 - indent, subsequent_indent=" " * indent
        )[3:-3]


def _is_list_of_names(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "__all__"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found, expected = STUB.read_text(encoding="utf-8"), generate()
    if not check:
        STUB.write_text(expected, encoding="utf-8")
    elif found != expected:
        lines = (found.splitlines(), expected.splitlines(), "committed", "built")
        print("\n".join(difflib.unified_diff(*lines, lineterm="")))
        sys.exit(f"{STUB.name} differs from the built module: run `make stubs`")


if __name__ == "__main__":
    main()

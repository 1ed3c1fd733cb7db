"""The one table of rooms: which part of the source may know which other part.

The tests read every `#include` of csrc/ and every `import` of kernels/ and moeinf/, those in
functions and under TYPE_CHECKING too. They fail on an arrow that the table does not allow, on a
circle of rooms or of files, and on a room that holds more than a quarter of the core.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room is a folder with all folders in it, or one Python file. Where two names fit a file, the
# longer one is its room. CONTRIBUTING.md shows the same table.
# Room of csrc/: the other rooms of csrc/ that it may include.
CORE = {
    "base": "",
    "layout": "base",
    "memory": "base",
    "device": "base memory",
    "policy": "base",
    "prefetch": "base policy",
    "transfer": "base layout memory",
    "tier": "base layout memory device policy transfer",
    "cache": "base layout memory device policy prefetch transfer tier",
    "trace": "base policy",
    "threads": "base",
    "floats": "base",
    "cpu_kernels": "base layout floats",
    "compute": "base layout threads cpu_kernels",
    "cuda": "base memory device",
    "probe": "base layout memory device policy prefetch transfer tier cache threads",
    "experts": "base layout memory device policy cache threads compute",
    "capi": "base layout device policy tier cache cpu_kernels compute cuda experts",
    "bindings": "base layout memory device policy prefetch transfer tier cache trace threads "
    "cpu_kernels compute cuda probe experts",
}
# Room of Python: the other rooms that it may import. `_core` is the compiled csrc/.
PYTHON = {
    "kernels/forms": "",
    "kernels/gates": "kernels/forms",
    "kernels": "kernels/forms kernels/gates",
    "moeinf/_core": "",
    "moeinf/errors": "",
    "moeinf/cpus": "",
    "moeinf/pocket": "",
    "moeinf/checkpoint": "moeinf/_core moeinf/errors kernels/forms kernels/gates",
    "moeinf/share": "",
    "moeinf/output_files": "",
    "moeinf/traces": "moeinf/_core moeinf/errors moeinf/share moeinf/output_files",
    "moeinf/cache": "moeinf/_core moeinf/errors moeinf/share moeinf/checkpoint moeinf/traces "
    "moeinf/output_files",
    "moeinf/experts": "moeinf/_core moeinf/errors moeinf/cpus moeinf/checkpoint moeinf/cache "
    "kernels kernels/forms kernels/gates",
    "moeinf/profiles": "moeinf/_core moeinf/cpus moeinf/output_files",
    "moeinf/integrations": "moeinf/_core moeinf/errors moeinf/checkpoint moeinf/traces "
    "moeinf/cache moeinf/experts moeinf/profiles moeinf/pocket kernels/forms kernels/gates",
    "moeinf/packing": "moeinf/errors moeinf/checkpoint moeinf/cache moeinf/integrations "
    "moeinf/output_files moeinf/memory_read kernels/forms kernels/gates",
    "moeinf/planning": "moeinf/_core moeinf/errors moeinf/checkpoint moeinf/traces moeinf/cache "
    "moeinf/experts moeinf/integrations moeinf/packing moeinf/memory_read moeinf/pocket "
    "kernels/forms",
    "moeinf/report": "moeinf/errors moeinf/traces moeinf/output_files",
    "moeinf/server": "moeinf/cache moeinf/integrations",
    "moeinf/native": "",
    "moeinf/memory_read": "moeinf/_core",
    "moeinf/machine": "moeinf/_core moeinf/errors moeinf/cpus moeinf/cache moeinf/memory_read",
    "moeinf/cli": "moeinf/_core moeinf/errors moeinf/checkpoint moeinf/traces moeinf/cache "
    "moeinf/integrations moeinf/packing moeinf/planning moeinf/report moeinf/pocket "
    "moeinf/server moeinf/machine moeinf/output_files moeinf/profiles",
    # moeinf/__init__.py alone: the public names, each imported when it is first used.
    "moeinf": "moeinf/_core moeinf/errors moeinf/checkpoint moeinf/traces moeinf/cache "
    "moeinf/experts moeinf/integrations moeinf/packing moeinf/native kernels kernels/forms",
}
ROOMS = {f"csrc/{room}": {f"csrc/{name}" for name in known.split()} for room, known in CORE.items()}
ROOMS |= {room: set(known.split()) for room, known in PYTHON.items()}
# Library: the rooms that may import it. Every room may use the standard library, torch and NumPy.
LIBRARIES = {
    "triton": {"kernels", "kernels/gates"},
    "safetensors": {"moeinf/traces"},
    "huggingface_hub": {"moeinf/checkpoint", "moeinf/integrations"},
    "transformers": {"moeinf/integrations", "moeinf/planning", "moeinf/cli", "moeinf/server"},
    "accelerate": {"moeinf/integrations"},
    "peft": {"moeinf/integrations"},
    "prometheus_client": {"moeinf/integrations", "moeinf/server"},
    "sglang": {"moeinf/integrations"},
    "vllm": {"moeinf/integrations"},
    "jinja2": {"moeinf/integrations"},
    "matplotlib": {"moeinf/report"},
    "fastapi": {"moeinf/server"},
    "starlette": {"moeinf/server"},
    "pydantic": {"moeinf/server"},
    "uvicorn": {"moeinf/server"},
    "h11": {"moeinf/server"},
    "typer": {"moeinf/cli"},
    "rich": {"moeinf/cli"},
}
OWN = {"moeinf", "kernels", "benchmarks", "tests", "tools", "examples"}


def room_of(path: str) -> str:
    """The room of a file or module, given as a path from the root without its suffix."""
    fitting = [room for room in ROOMS if f"{path}/".startswith(f"{room}/")]
    assert fitting, f"{path} is in no room of the table"
    return max(fitting, key=len)


def c_sources() -> list[Path]:
    suffixes = {".h", ".cpp", ".cu"}
    return sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in suffixes)


def python_sources() -> list[Path]:
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "moeinf").rglob("*.py")]
    return sorted({file.resolve() for file in files})  # moeinf/kernels links to kernels/


def name_of(file: Path) -> str:
    """The path of a file from the root; moeinf/kernels.py stands for the package kernels/."""
    name = file.relative_to(ROOT).as_posix().removesuffix(".py")
    return "kernels/__init__" if name == "moeinf/kernels" else name


def included(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M)


def imported(text: str, name: str) -> Iterator[str]:
    """Every module or member that a Python file imports, as a path; `name` is the file's own."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "/".join(name.split("/")[: -node.level]) if node.level else ""
            path = "/".join(filter(None, [base, (node.module or "").replace(".", "/")]))
            yield from (f"{path}/{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in filter(lambda one: isinstance(one, ast.Constant), node.args):
                yield str(argument.value).replace(".", "/")


def imported_of(file: Path) -> list[str]:
    """As `imported`, with moeinf.kernels under its own name."""
    found = imported(file.read_text(encoding="utf-8"), name_of(file))
    return [re.sub(r"^moeinf/kernels\b", "kernels", path) for path in found]


def file_of(path: str) -> str | None:
    """The source file of an imported module, or of the module whose member was imported."""
    if path.startswith("moeinf/_core"):
        return None
    for candidate in (path, path.rpartition("/")[0]):
        for name in (candidate, f"{candidate}/__init__"):
            if (ROOT / f"{name}.py").is_file():
                return name
    return None


def test_the_reader_sees_imports_wherever_they_stand() -> None:
    text = (
        "import a.b\nif TYPE_CHECKING:\n    from c import d as e\n"
        "def f():\n    from . import g\n    from ..h import i\n    importlib.import_module('j.k')\n"
    )
    found = set(imported(text, "moeinf/cache/cache"))
    assert found == {"a/b", "c/d", "moeinf/cache/g", "moeinf/h/i", "j/k"}
    assert included('#include "a/b.h"\n#include <c>\n  # include "d.h"\n// #include "e.h"\n') == [
        "a/b.h",
        "d.h",
    ]


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("csrc/")])
def test_a_room_of_the_core_includes_only_rooms_that_it_may_know(room: str) -> None:
    files = [file for file in c_sources() if room_of(name_of(file)) == room]
    assert files
    for file in files:
        for path in included(file.read_text(encoding="utf-8")):
            if file.name == "driver_check.cpp" and path == "cuda.h":
                continue
            other = room_of(f"csrc/{path}")
            assert other in ROOMS[room] | {room}, f"{name_of(file)} includes {path}"


@pytest.mark.parametrize("room", [room for room in ROOMS if not room.startswith("csrc/")])
def test_a_room_of_python_imports_only_rooms_and_libraries_that_it_may_know(room: str) -> None:
    for file in python_sources():
        if room_of(name_of(file)) != room:
            continue
        for path in imported_of(file):
            library = path.split("/")[0]
            if library in OWN:
                other = room_of(path)
                assert other in ROOMS[room] | {room}, f"{name_of(file)} imports {path}"
            elif library not in sys.stdlib_module_names | {"torch", "numpy"}:
                assert room in LIBRARIES.get(library, ()), f"{name_of(file)} imports {path}"


def test_every_python_file_is_in_a_room_of_its_own_name() -> None:
    for file in python_sources():
        if room_of(name_of(file)) == "moeinf":
            assert file == ROOT / "moeinf" / "__init__.py", f"{file} needs a row in the table"


def test_every_package_is_installed() -> None:
    stated = re.search(r"\npackages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert stated is not None
    packages = re.findall(r'"([\w.]+)"', stated[1])
    folders = {file.parent for file in (ROOT / "moeinf").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert found | {"moeinf.kernels"} == set(packages)


def test_no_circle_of_rooms() -> None:
    TopologicalSorter(ROOMS).prepare()


def test_no_circle_of_files() -> None:
    graph = {
        file.relative_to(ROOT / "csrc").as_posix(): included(file.read_text(encoding="utf-8"))
        for file in c_sources()
    }
    TopologicalSorter(graph).prepare()
    arrows = {name_of(file): set(map(file_of, imported_of(file))) for file in python_sources()}
    TopologicalSorter({file: found - {None, file} for file, found in arrows.items()}).prepare()


def test_no_room_holds_more_than_a_quarter_of_the_core() -> None:
    lines: dict[str, int] = {}
    for file in c_sources():
        room = room_of(name_of(file))
        if room not in ("csrc/bindings", "csrc/capi"):
            count = len(file.read_text(encoding="utf-8").splitlines())
            lines[room] = lines.get(room, 0) + count
    largest = max(lines, key=lambda room: lines[room])
    assert lines[largest] <= sum(lines.values()) / 4, f"{largest}: {lines[largest]} lines"


def test_only_bindings_know_python_and_only_two_files_load_libraries() -> None:
    for file in c_sources():
        text, room = file.read_text(encoding="utf-8"), room_of(name_of(file))
        if room != "csrc/bindings":
            assert not re.search(r"#include <(pybind11|Python\.h)", text), file
        assert not re.search(r"#include <(torch|ATen|c10)", text), file
        if room != "csrc/cuda":
            assert not re.search(r"#include <(cuda|nv)", text), file
        if name_of(file) not in ("csrc/cuda/driver.cpp", "csrc/base/ranges.cpp"):
            assert not re.search(r"\bdlm?open\s*\(", text), file


def test_the_table_in_contributing_is_this_one() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {
        room: set(re.findall(r"`([^`]+)`", known))
        for room, known in re.findall(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|$", text, re.M)
        if room in ROOMS
    }
    for room, known in ROOMS.items():
        short = {name.rpartition("csrc/")[2] for name in known}
        assert shown.get(room) == short, f"row of {room} in CONTRIBUTING.md"

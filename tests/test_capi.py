"""The C interface as programs in C, C++ and Rust use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeinf
from moeinf.errors import UnsupportedError
from moeinf.pocket import POCKET

ROOT = Path(__file__).resolve().parent.parent
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")


def cc(language: str) -> list[str]:
    compiler = shutil.which("cc" if language == "c" else "c++")
    if compiler is None:
        pytest.skip(f"no compiler for {language}")
    return [compiler]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, capture_output=True, timeout=120, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()
    return done


@pytest.fixture(scope="module")
def layer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/c/layer.c, compiled against what the package says."""
    program = tmp_path_factory.mktemp("c") / "layer"
    library = Path(moeinf.get_library())
    run(
        [
            *(*cc("c"), "-std=c99", *STRICT, f"-I{moeinf.get_include()}"),
            *(str(ROOT / "examples/c/layer.c"), f"-L{library.parent}", "-lmoeinf"),
            *(f"-Wl,-rpath,{library.parent}", "-o", str(program)),
        ]
    )
    return program


def compute_in_c(
    program: Path, description: Path, layer: int, slots: int, parts: list[torch.Tensor]
) -> torch.Tensor:
    hidden, ids, weights = parts
    data = np.array(ids.shape, dtype=np.int32).tobytes() + b"".join(
        one.contiguous().numpy().tobytes() for one in (hidden, ids, weights)
    )
    done = run([str(program), str(description), str(layer), str(slots)], input=data)
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view_as(hidden)


def routed(store: moeinf.ExpertStore, tokens: int, top_k: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, store.layout.hidden, generator=random)
    scores = torch.randn(tokens, store.num_experts, generator=random)
    weights, ids = scores.softmax(-1).topk(top_k)
    return [hidden, ids.int(), weights]


@pytest.mark.parametrize("language, standard", [("c", "c99"), ("c", "c11"), ("c++", "c++11")])
def test_the_header_compiles_alone(language: str, standard: str, tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text(
        "#include <moeinf.h>\nint main(void) {\n    moeinf_cache_options options;\n"
        "    MOEINF_INIT(options);\n    return (int)options.api_version - 1;\n}\n"
    )
    command = [*cc(language), "-x", language, f"-std={standard}", *STRICT]
    program = tmp_path / "use"
    run([*command, f"-I{moeinf.get_include()}", str(source), "-o", str(program)])
    run([str(program)])


def test_only_names_of_the_interface_are_exported() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    found = run(["nm", "-D", "--defined-only", moeinf.get_library()]).stdout.decode()
    names = {line.split()[-1] for line in found.splitlines()}
    header = (Path(moeinf.get_include()) / "moeinf.h").read_text()
    declared = re.findall(
        r"^(?:moeinf_status |uint32_t |const char ?\* ?)(moeinf_\w+)\(", header, re.M
    )
    assert names == set(declared)


def test_the_version_is_that_of_the_package() -> None:
    pc = (Path(moeinf.get_library()).parent / "pkgconfig" / "moeinf.pc").read_text()
    stated = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert f"Version: {stated[1]}\n" in pc


def test_pkg_config_finds_header_and_library(tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config")
    folder = Path(moeinf.get_library()).parent / "pkgconfig"
    flags = run(
        ["pkg-config", "--cflags", "--libs", "moeinf"],
        env={**os.environ, "PKG_CONFIG_PATH": str(folder)},
    ).stdout.decode()
    source = tmp_path / "use.c"
    source.write_text(
        "#include <moeinf.h>\n#include <stdio.h>\n"
        "int main(void) { return puts(moeinf_version()) < 0; }\n"
    )
    run([*cc("c"), str(source), *flags.split(), "-o", str(tmp_path / "use")])
    assert run([str(tmp_path / "use")]).stdout.decode().strip()[0].isdigit()


@pytest.mark.parametrize("layer, tokens, slots", [(0, 1, 0), (2, 7, 3), (1, 300, 1)])
def test_a_layer_of_the_built_in_model_in_c_is_that_of_python_to_the_bit(
    layer_program: Path, tmp_path: Path, layer: int, tokens: int, slots: int
) -> None:
    store = moeinf.ExpertStore.open(POCKET)
    store.describe(tmp_path / "experts.txt")
    parts = routed(store, tokens, store.top_k or 2, seed=tokens)
    found = compute_in_c(layer_program, tmp_path / "experts.txt", layer, slots, parts)
    expected = moeinf.fused_experts(*parts, moeinf.ExpertCache(store), layer=layer)
    assert found.abs().sum() > 0
    assert torch.equal(found, expected)


def test_packed_experts_are_described_with_all_they_have(
    layer_program: Path, tmp_path: Path
) -> None:
    """The last one has up in another format than gate and down."""
    formats = {
        "int4": "int4", "nvfp4": "e2m1", "fp8": "e4m3", "bf16-palette": "bf16, palette3",
        "mixed": "int4, e2m1",
    }  # fmt: skip
    for form, names in formats.items():
        packed = tmp_path / form
        if form == "mixed":
            no_weights = shutil.ignore_patterns("*.safetensors*")
            shutil.copytree(tmp_path / "int4", packed, ignore=no_weights)
            tensors = {
                name: tensor
                for source, is_up in (("int4", False), ("nvfp4", True))
                for file in (tmp_path / source).glob("*.safetensors")
                for name, tensor in load_file(file).items()
                if (".up_proj." in name) is is_up
            }
            save_file(tensors, packed / "model.safetensors")
        else:
            moeinf.pack(POCKET, packed, format=form)
        store = moeinf.ExpertStore.open(packed)
        assert store.layout.format_names == names
        store.describe(tmp_path / "experts.txt")
        parts = routed(store, 5, 2, seed=3)
        found = compute_in_c(layer_program, tmp_path / "experts.txt", 1, 4, parts)
        expected = moeinf.fused_experts(*parts, moeinf.ExpertCache(store), layer=1)
        assert torch.equal(found, expected), form


def refused(program: Path, description: Path) -> str:
    done = subprocess.run(
        [str(program), str(description), "0", "1"], input=b"", capture_output=True, timeout=60
    )
    assert done.returncode == 1
    return done.stderr.decode()


def test_a_description_that_is_damaged_or_outdated_is_refused(
    layer_program: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(POCKET, copy)
    description = tmp_path / "experts.txt"
    moeinf.ExpertStore.open(copy).describe(description)
    lines = description.read_text().splitlines()

    def with_lines(changed: list[str]) -> str:
        bad = tmp_path / "bad.txt"
        bad.write_text("\n".join(changed) + "\n")
        return refused(layer_program, bad)

    assert "begins with" in with_lines(["hello"])
    assert "ends too early" in with_lines(lines[:-1])
    assert "line 2: expected a number" in with_lines([lines[0], "shape x 2 3", "end"])
    assert "no line begins with" in with_lines([lines[0], "future 1", "end"])
    assert "expected a function" in with_lines([lines[0], "end"])
    assert "extents" in with_lines([line for line in lines if line[:6] != "extent"])
    assert "cannot be opened" in refused(layer_program, tmp_path / "nowhere.txt")
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert f"{weights}: was changed after the description was written" in refused(
        layer_program, description
    )
    weights.unlink()
    assert "cannot be examined" in refused(layer_program, description)


def test_experts_in_no_file_cannot_be_described(tmp_path: Path) -> None:
    layer = {"gate_up": torch.randn(2, 64, 32), "down": torch.randn(2, 32, 32)}
    store = moeinf.ExpertStore.from_tensors([layer])
    with pytest.raises(UnsupportedError, match="expected experts in files"):
        store.describe(tmp_path / "experts.txt")


def test_the_rust_example_reads_the_experts_that_python_reads(tmp_path: Path) -> None:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo: the Rust example is not tested here")
    store = moeinf.ExpertStore.open(POCKET)
    store.describe(tmp_path / "experts.txt")
    done = run(
        [
            *("cargo", "run", "--offline", "--quiet", "--manifest-path"),
            *(str(ROOT / "examples/rust/Cargo.toml"), "--", str(tmp_path / "experts.txt")),
        ],
        env={
            **os.environ,
            "MOEINF_LIB": str(Path(moeinf.get_library()).parent),
            "CARGO_TARGET_DIR": str(tmp_path / "target"),
        },
    )
    cache = moeinf.ExpertCache(store)
    expected = set()
    for layer in range(2):
        with cache.acquire(layer, [0, 1]) as lease:
            slot = cache.pool()[lease.slots[1]][: store.layout.nbytes]
            expected.add(f"layer {layer}: {slot.sum(dtype=torch.int64).item()}")
    assert set(done.stdout.decode().split("\n")) - {""} == expected

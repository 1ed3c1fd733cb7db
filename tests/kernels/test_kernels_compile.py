"""Every kernel becomes machine code for every architecture, without a GPU, and spills nowhere.

Here each kernel with its default configuration on all architectures, and the forms of models on
one. MOEINF_COMPILE_ALL=1 takes every row of the tuning table and every form on all of them
(minutes); `python -m benchmarks.kernel_compile` prints what each needs.
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import kernel_compile as compiling
from moeinf.kernels import checks, tuning

pytestmark = pytest.mark.skipif(
    not all(isinstance(kernel, JITFunction) for kernel in compiling.KERNELS.values()),
    reason="TRITON_INTERPRET is set: kernels are not compiled in this process",
)
ALL = os.environ.get("MOEINF_COMPILE_ALL") == "1"
FORMS_ON = compiling.ARCHITECTURES if ALL else (90,)


def check(cases: list[compiling.Case], arch: int) -> None:
    found = []
    for case in dict.fromkeys(cases):
        machine = compiling.compile_case(case, arch)
        wrong = compiling.faults(machine, arch)
        print(
            f"sm_{arch} {case.label()}: {machine.registers} registers, {machine.stack} bytes "
            f"spilled, {machine.shared} bytes shared {wrong}"
        )
        found += [f"sm_{arch} {case.label()}: {fault}" for fault in wrong]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
def test_every_kernel_for_every_architecture(arch: int) -> None:
    cases = compiling.default_cases(arch)
    assert {case.kernel for case in cases} == compiling.KERNELS.keys()
    check(cases, arch)


@pytest.mark.parametrize("arch", FORMS_ON)
@pytest.mark.timeout(1800)
def test_every_form(arch: int) -> None:
    check(compiling.form_cases(arch), arch)


@pytest.mark.skipif(not ALL, reason="minutes long: set MOEINF_COMPILE_ALL=1")
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.timeout(1800)
def test_every_row_of_the_table(arch: int) -> None:
    check(list(compiling.table_cases(arch)), arch)


@pytest.mark.parametrize("kernel", ["gate_up_vector", "down_vector", "sum_routes"])
def test_weights_are_read_16_bytes_at_a_time(kernel: str) -> None:
    case = next(case for case in compiling.default_cases(90) if case.kernel == kernel)
    ptx = compiling.compile_case(case, 90).ptx
    assert ".v4.b32" in ptx, ptx


DECODE = ("gate_up_vector", "down_vector", "gate_up_shared", "down_shared")


@pytest.mark.parametrize("form", [{}, {"map": True}, {"interleaved": True}], ids=str)
def test_every_load_of_decode_weights_is_16_bytes_wide(form: dict[str, bool]) -> None:
    """Also for transposed weights; but those that are interleaved too are read one by one."""
    for case in compiling.table_cases(90):
        if case.kernel not in DECODE or case.dtype == "float32":
            continue
        for formed in compiling.with_form([case], **form):
            if form.get("interleaved") and case.order == "columns":
                continue
            machine = compiling.compile_case(formed, 90)
            weights = ("gate", "up") if case.kernel.startswith("gate_up") else ("down",)
            for name in weights:
                assert machine.loads[name].keys() == {16}, (formed.label(), machine.loads)


# What the place of a block in a row allows, of the bytes of codes: see kernels/blocks.py.
WIDTHS = {"mxfp4": 1, "q4_1": 4, "q5_1": 4, "q2_k": 4, "iq4_xs": 8, "q4_k": 8, "q5_k": 8}


@pytest.mark.parametrize("weights", [name for name in compiling.SCALED if "gguf" in name])
def test_blocks_are_read_as_wide_as_they_lie(weights: str) -> None:
    """Codes, and the scales of all formats but those whose scale is one byte."""
    name = weights.removeprefix("gguf ")
    (case, *_) = compiling.with_form(compiling.default_cases(90, weights=name), weights=weights)
    loads = compiling.compile_case(case, 90).loads["gate"]
    assert max(loads) >= WIDTHS.get(name, 2), loads
    # Bytes of scales, of each group of columns.
    narrow = {"mxfp4": None, "q2_k": 1, "q3_k": 2, "q6_k": 1}.get(name, 0)
    assert narrow is None or loads.get(1, 0) == narrow, loads


@pytest.mark.parametrize("kernel,width", [("gate_up_vector", 8), ("gate_up_shared", 16)])
def test_palettes_are_read_in_wide_words(kernel: str, width: int) -> None:
    """A lane reads as many columns of blocks as it has of a token. Base exponents are bytes and
    entries are words, outside of the loops."""
    cases = compiling.with_form(compiling.default_cases(90, weights="palette15"), weights="palette")
    machine = compiling.compile_case(next(case for case in cases if case.kernel == kernel), 90)
    for name in ("gate", "up"):
        assert machine.loads[name].keys() == {1, 4, width}, machine.loads
        assert machine.loads[name][1] == 1
    # No thread passes codes or numbers to another one.
    assert kernel != "gate_up_vector" or machine.shared <= 64


@pytest.mark.parametrize("kernel", ["gate_up_vector", "down_vector"])
def test_lanes_find_their_operand_in_place(kernel: str) -> None:
    """Inside the loops no thread passes data to another one; that would need a tile of float32.

    The shared memory of the sums at the end is small: 32 bytes with Triton 3.9, 2 KiB with 3.6.
    """
    case = next(case for case in compiling.default_cases(90) if case.kernel == kernel)
    config = dict(case.config)
    tile = 4 * config["BLOCK_I"] * config["BLOCK_H"] * config.get("ROUTES", 1)
    assert compiling.compile_case(case, 90).shared <= tile // 4


@pytest.mark.parametrize("kernel", ["gate_up_shared", "down_shared"])
def test_weights_of_shared_experts_are_copied_ahead(kernel: str) -> None:
    """At least two tiles of weights are in flight while one is multiplied."""
    case = next(case for case in compiling.default_cases(90) if case.kernel == kernel)
    machine = compiling.compile_case(case, 90)
    config = dict(case.config)
    tile = config["BLOCK_I"] * config["BLOCK_H"] * 2
    assert "cp.async.cg" in machine.ptx
    assert machine.shared >= 3 * tile, (machine.shared, tile)


def test_no_kernel_uses_atomics() -> None:
    for case in compiling.default_cases(90):
        ptx = compiling.compile_case(case, 90).ptx
        assert not re.search(r"\b(atom|red)\.", ptx), case.kernel


def test_a_spill_would_be_seen() -> None:
    """The check itself: a tile far too large for the registers is reported."""
    config = {"BLOCK_I": 16, "BLOCK_H": 512, "STAGES": 1, "num_warps": 1, "num_stages": 1}
    case = compiling.Case("gate_up_vector", "float32", tuple(config.items()))
    assert compiling.faults(compiling.compile_case(case, 90), 90)


def test_both_prefill_kernels_share_their_tiles() -> None:
    for arch in compiling.ARCHITECTURES:
        for dtype in compiling.SHORT:
            for rows in (16, 32, 64, 128):
                heights = {
                    tuning.config(
                        kernel, (f"sm_{arch}", "*"), dtype=dtype,
                        hidden=2048, intermediate=768, rows_per_tile=rows,
                    )["BLOCK_M"]
                    for kernel in ("gate_up_grouped", "down_grouped")
                }  # fmt: skip
                assert len(heights) == 1, (arch, dtype, rows, heights)


def test_decode_fills_a_large_chip() -> None:
    """Four waves of programs and more on 132 multiprocessors for one token of Qwen3-30B-A3B, with
    the blocks of devices on which none were timed."""
    H, I, k = 2048, 768, 8  # noqa: E741
    first, second = (
        tuning.config(kernel, ("*",), dtype="bfloat16", hidden=H, intermediate=I)
        for kernel in ("gate_up_vector", "down_vector")
    )
    assert k * -(-I // first["BLOCK_I"]) >= 4 * 132
    assert -(-H // second["BLOCK_H"]) >= 4 * 132


def test_kernels_refuse_the_cpu_where_they_cannot_run() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="expected a CUDA device, found cpu"):
        checks.check_device(torch.device("cpu"))

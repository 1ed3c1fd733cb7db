"""Compiles kernels to machine code for GPUs that are absent, and reads the properties of the code.

Called by the tests and by kernel_evidence; `python -m benchmarks.kernel_compile` prints a table.
Needs Triton with its ptxas and cuobjdump, but no GPU and no driver. Launches nothing.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeinf.checkpoint.blocks import BLOCKS
from moeinf.kernels import decode_shared, decode_vector, prefill, route_sum, tuning
from moeinf.kernels.formats import FORMATS as ROWS
from moeinf.kernels.formats import tuned_as
from moeinf.kernels.gates import ACTIVATIONS, GATES

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Largest dynamic shared memory of one block, in bytes (CUDA programming guide, table of
# technical specifications per compute capability: maximum per block, opt-in).
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
KERNELS = {
    "gate_up_vector": decode_vector.gate_up_vector,
    "down_vector": decode_vector.down_vector,
    "gate_up_shared": decode_shared.gate_up_shared,
    "down_shared": decode_shared.down_shared,
    "gate_up_grouped": prefill.gate_up_grouped,
    "down_grouped": prefill.down_grouped,
    "sum_routes": route_sum.sum_routes,
}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FORMATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
STRIDES_OF_SCALES = ("stride_cs", "stride_cn", "stride_ck")
# Pointers to something else than weights.
INTEGERS = {"groups", "rows", "order", "slot", "first", "end"}
ADDRESSES = {"ids", "map"}


@dataclass(frozen=True)
class Scaled:
    """Weights with scales: constants of the kernels, and what their pointers point to."""

    format: str
    values: str
    scale_type: str
    scales: str | None  # None: in the blocks of the values
    block: tuple[int, int]
    multiplier: bool = False
    zeros: bool = False

    def fold(self, dtype: str) -> bool:
        return dtype == "bfloat16" and self.scale_type in ("e8m0", "e4m3")


SCALED = {
    "fp8 blocks": Scaled("e4m3", "u8", "float", "fp32", (128, 128)),
    "fp8 channels": Scaled("e4m3", "u8", "float", "bf16", (1, 0)),
    "mxfp8": Scaled("e4m3", "u8", "e8m0", "u8", (1, 32)),
    "mxfp4": Scaled("e2m1", "u8", "e8m0", "u8", (1, 32)),
    "nvfp4": Scaled("e2m1", "u8", "e4m3", "u8", (1, 16), multiplier=True),
    "int4": Scaled("int4", "u8", "float", "bf16", (1, 32)),
    "int8": Scaled("int8", "i8", "float", "fp32", (1, 0)),
    "int4 zeros": Scaled("int4", "u8", "float", "fp16", (1, 128), zeros=True),
    "int8 zeros": Scaled("int8", "i8", "float", "fp16", (1, 0), zeros=True),
    **{f"gguf {name}": Scaled(name, "u8", "blocks", None, (1, 0)) for name in BLOCKS},
    "palette": Scaled("palette15", "u8", "palette", None, (1, 0)),
}


# Of gate and of up, where they differ.
PAIRS = (
    ("gguf q4_k", "gguf q6_k"), ("int4 zeros", "int8"), ("nvfp4", "mxfp4"),
    ("fp8 blocks", "fp8 channels"), ("palette", "int4"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One specialisation: a kernel, a dtype of weights, a configuration and a form.

    The form has constants of the kernel by name (FUNCTION, ACTIVATION), and `map`, `bias`,
    `has_gate` and `interleaved`, which say what tensors there are and how rows lie. `weights` and
    `up_weights` name rows of SCALED; without the latter up is stored as gate is.
    """

    kernel: str
    dtype: str
    config: tuple[tuple[str, int], ...]
    order: str = "rows"  # the contiguous side of the weights
    form: tuple[tuple[str, Any], ...] = ()

    def label(self) -> str:
        words = [f"{k}={v}" for k, v in self.config] + [f"{k}={v}" for k, v in self.form]
        return f"{self.kernel} {SHORT[self.dtype]} {self.order} {' '.join(words)}"


@dataclass(frozen=True)
class Machine:
    """What a compiled kernel needs: registers per thread, bytes on the stack, bytes of shared."""

    registers: int
    stack: int
    shared: int
    ptx: str = field(repr=False)
    loads: dict[str, dict[int, int]] = field(repr=False, default_factory=dict)  # see load_widths


def upcast(dtype: str, arch: int) -> bool:
    return dtype == "float32" or arch < 80


def constants(case: Case, arch: int) -> dict[str, Any]:
    names = KERNELS[case.kernel].arg_names
    form = {"map": False, "bias": False, "has_gate": True, "interleaved": False} | dict(case.form)
    scaled, up_scaled = (SCALED.get(form.pop(one, "")) for one in ("weights", "up_weights"))
    values: dict[str, Any] = {
        "FORMAT": FORMATS[case.dtype], "FUNCTION": "glu", "ACTIVATION": "silu",
        "TOKENS": 16, "K_PAD": 8, "R_PAD": 128, "UPCAST": upcast(case.dtype, arch),
        "BLOCK_H": 512, "ROWWISE": case.order == "rows",
    }  # fmt: skip
    values |= form | dict(case.config)
    up = form["interleaved"] and case.kernel.startswith("gate_up") and case.order == "columns"
    values |= {"stride_wk": 1} if case.order == "rows" else {"stride_wn": 2 if up else 1}
    # What is absent is None, which is a constant.
    absent = []
    if scaled is None:
        values |= {"SCALE_TYPE": None, "SCALE_N": 1, "SCALE_K": 0, "FOLD": False}
    else:
        fold = scaled.fold(case.dtype)
        values |= {
            "FORMAT": scaled.format, "SCALE_TYPE": scaled.scale_type, "SCALE_N": scaled.block[0],
            "SCALE_K": scaled.block[1], "FOLD": fold, "stride_ck": 1,
            "UPCAST": upcast(case.dtype, arch) or case.dtype == "float16",
        }  # fmt: skip
        summed = "BLOCK_H" if case.kernel.startswith("gate_up") else "BLOCK_I"
        for one in filter(None, (scaled, up_scaled)):
            cols = one.block[1] or (0 if values["UPCAST"] else ROWS[one.format].group)
            if cols and not one.fold(case.dtype) and not case.kernel.endswith("vector"):
                values[summed] = min(values[summed], cols)
    names_of_up = [name for name in names if name.startswith(("UP_", "stride_up_"))]
    if up_scaled is None:
        values |= dict.fromkeys(names_of_up)
    else:
        values |= {
            "UP_FORMAT": up_scaled.format, "UP_SCALE_TYPE": up_scaled.scale_type,
            "UP_SCALE_N": up_scaled.block[0], "UP_SCALE_K": up_scaled.block[1],
            "UP_FOLD": up_scaled.fold(case.dtype), "UP_UPCAST": values["UPCAST"],
            "stride_up_wk": 1, "stride_up_ck": 1,
        }  # fmt: skip
        if up_scaled.scales is None:
            values |= dict.fromkeys(["stride_up_cs", "stride_up_cn", "stride_up_ck"])
    for matrix, one in (("gate", scaled), ("up", up_scaled or scaled), ("down", scaled)):
        if one is None or one.scales is None:
            absent += [f"{matrix}_scales_ptr"]
        if one is None or not one.multiplier:
            absent += [f"{matrix}_multiplier_ptr"]
        if one is None or not one.zeros:
            absent += [f"{matrix}_zeros_ptr"]
    if scaled is None or scaled.scales is None:
        absent += STRIDES_OF_SCALES
    if not any(one and one.multiplier for one in (scaled, up_scaled)):
        absent += ["stride_ms"]
    absent += [] if form["map"] else ["map_ptr"]
    absent += [] if form["has_gate"] else ["up_ptr", "up_scales_ptr", "up_zeros_ptr", "up_bias_ptr"]
    if form["bias"]:
        values["stride_bn"] = 2 if form["interleaved"] and case.kernel.startswith("gate_up") else 1
    else:
        absent += ["gate_bias_ptr", "up_bias_ptr", "down_bias_ptr", "stride_bs", "stride_bn"]
    values |= dict.fromkeys(absent)
    return {name: value for name, value in values.items() if name in names}


def argument_type(kernel: str, name: str, dtype: str, scaled: Scaled | None = None) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name in ("alpha", "limit") else "i32"
    stem = name.removesuffix("_ptr")
    if stem in ADDRESSES:
        return "*i64"
    if stem in INTEGERS:
        return "*i32"
    decode = not kernel.endswith("grouped")
    if stem.endswith("multiplier"):
        return "*fp32"
    if scaled is not None and stem in ("gate", "up", "down"):
        return "*" + scaled.values
    if scaled is not None and scaled.scales and stem.endswith("_scales"):
        return "*" + scaled.scales
    if stem.endswith("_zeros"):
        return "*i8"
    if stem == "weights" or (stem == "routes" and decode):
        return "*fp32"
    return "*" + SHORT[dtype]


def compile_case(case: Case, arch: int) -> Machine:
    kernel = KERNELS[case.kernel]
    fixed = constants(case, arch)
    scaled, up_scaled = (SCALED.get(dict(case.form).get(w, "")) for w in ("weights", "up_weights"))
    signature = {
        name: "constexpr"
        if name in fixed
        else argument_type(
            case.kernel,
            name,
            case.dtype,
            up_scaled if up_scaled and name.startswith("up_") else scaled,
        )
        for name in kernel.arg_names
    }
    # What a launch would find: aligned pointers, and sizes and strides that 16 divides.
    plain = {"T", "top_k", "tiles", "alpha", "limit", "per_route", *fixed}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in plain
    }
    options = {"enable_fp_fusion": True, "num_warps": 4}
    options |= {k: v for k, v in case.config if k in ("num_warps", "num_stages")}
    compiled = triton.compile(
        ASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    usage = resource_usage(compiled.asm["cubin"])
    return Machine(
        registers=usage["REG"],
        stack=max(usage["STACK"], usage["LOCAL"]),
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        loads=load_widths(compiled.asm["ptx"], [n for n in kernel.arg_names if n not in fixed]),
    )


def load_widths(ptx: str, arguments: list[str]) -> dict[str, dict[int, int]]:
    """Per argument that is read: bytes that one lane's load takes -> number of such instructions.

    An address is followed back through the registers it was computed from to the pointers that the
    kernel was given; what was itself loaded (a slot's id) is not followed.
    """
    made_of: dict[str, set[str]] = {}
    reads: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        line = re.sub(r"^\s*(@!?%\w+\s+)?|//.*$", "", line).strip()
        word = line.split(None, 1)[0] if line else ""
        if param := re.match(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)", line):
            made_of.setdefault(param[1], set()).add(f"param {param[2]}")
        elif word.startswith("ld.global"):
            lanes, bits = re.search(r"(?:\.v(\d))?\.[a-z]+(\d+)$", word).groups()  # type: ignore[union-attr]
            address = re.search(r"\[\s*(%\w+)", line)[1]  # type: ignore[index]
            reads.append((address, int(lanes or 1) * int(bits) // 8))
        elif word.startswith("cp.async") and ".shared.global" in word:
            _, address = re.findall(r"\[\s*(%\w+)", line)
            reads.append((address, int(re.search(r"\], (0x\w+|\d+)", line)[1], 0)))  # type: ignore[index]
        elif not word.startswith(("ld.", "st.")):
            target, *sources = re.findall(r"%\w+", line) or [""]
            made_of.setdefault(target, set()).update(sources)
    found: dict[str, dict[int, int]] = {}
    for address, width in reads:
        seen, todo = set(), [address]
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += made_of.get(name, ())
        for name in seen:
            if name.startswith("param "):
                argument = arguments[int(name[6:])] if int(name[6:]) < len(arguments) else ""
                if argument.endswith("_ptr"):
                    widths = found.setdefault(argument.removesuffix("_ptr"), {})
                    widths[width] = widths.get(width, 0) + 1
    return found


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, found {text!r}")
    return usage


def applies(row: dict[str, Any], arch: int) -> bool:
    device = row.get("device", "*")
    return device in ("*", f"sm_{arch}") or not device.startswith("sm_")


def table_cases(arch: int) -> Iterator[Case]:
    """Every row of the tuning table that a device of this architecture may use, per dtype."""
    for row in tuning.rows():
        if not applies(row, arch):
            continue
        for dtype, order in itertools.product(SHORT, ("rows", "columns")):
            if row.get("dtype", "*") in ("*", dtype) and row.get("order", "*") in ("*", order):
                chosen = effective(row, arch, dtype, order)
                if chosen == row["config"]:
                    yield Case(row["kernel"], dtype, tuple(chosen.items()), order)
    for dtype in SHORT:
        yield Case("sum_routes", dtype, (("BLOCK_H", 512), ("num_warps", 4)))


def effective(row: dict[str, Any], arch: int, dtype: str, order: str) -> Mapping[str, int]:
    """What the lookup answers where this row could: another row may win."""
    sizes = {name: row.get(name, "*") for name in ("hidden", "intermediate")}
    device = row.get("device", "*")
    names = (device, f"sm_{arch}", "*") if not device.startswith("sm_") else (f"sm_{arch}", "*")
    return tuning.config(
        row["kernel"],
        names,
        dtype=dtype,
        order=order,
        hidden=-1 if sizes["hidden"] == "*" else sizes["hidden"],
        intermediate=-1 if sizes["intermediate"] == "*" else sizes["intermediate"],
        rows_per_tile=-1 if row.get("rows", "*") == "*" else row["rows"],
    )


def in_floats(kernel: str, arch: int, formats: tuple[str, ...]) -> bool:
    return kernel != "gate_up_vector" and any(
        (ROWS[name].group and kernel == "down_vector") or (ROWS[name].unit > 1 and arch < 80)
        for name in formats
    )


def default_cases(
    arch: int, rows: int = 64, weights: str | None = None, others: tuple[str, ...] = ()
) -> list[Case]:
    """One case per kernel: bfloat16 (float16 on Turing), by rows, in blocks that `weights` suit.

    `weights` names a format, None stands for that of the tokens. `others`: more formats of the
    call. kernels/paths.py chooses tiles of float32 where one of them is multiplied as that.
    """
    formats = () if weights is None else (weights, *others)
    dtype = "bfloat16" if arch >= 80 else "float16"
    cases = []
    for kernel in KERNELS:
        if kernel == "sum_routes":
            config = {"BLOCK_H": 512, "num_warps": 4}
        else:
            config = tuning.config(
                kernel, (f"sm_{arch}", "*"),
                dtype="float32" if in_floats(kernel, arch, formats) else dtype,
                hidden=2048, intermediate=768,
                weights="plain" if weights is None else tuned_as(weights),
                rows_per_tile=rows if kernel.endswith("grouped") else 0,
            )  # fmt: skip
        cases.append(Case(kernel, dtype, tuple(config.items())))
    return cases


def with_form(cases: list[Case], **form: Any) -> list[Case]:
    """The cases whose kernels all of this concerns, in that form."""

    def concerned(kernel: str) -> set[str]:
        names = set(KERNELS[kernel].arg_names)
        gated = {"has_gate", "interleaved"} if "up_ptr" in names else set()
        biased = {"bias"} if {"gate_bias_ptr", "down_bias_ptr"} & names else set()
        biased |= {"weights"} if "FORMAT" in names else set()
        biased |= {"up_weights"} if "UP_FORMAT" in names else set()
        return names | gated | biased | ({"map"} if "map_ptr" in names else set())

    return [
        Case(case.kernel, case.dtype, case.config, case.order, tuple(form.items()))
        for case in cases
        if form.keys() <= concerned(case.kernel)
    ]


def form_cases(arch: int) -> list[Case]:
    """Every form of a model on the default configurations, and on the largest prefill tiles.

    Formats with scales take no tiles of 128 rows. Blocks with scales, zero points, and gate and up
    of two formats take none of 64: see kernels/paths.py.
    """
    cases = default_cases(arch) + default_cases(arch, rows=128)[-3:-1]
    forms: list[dict[str, Any]] = [
        {"bias": True}, {"map": True}, {"interleaved": True},
        {"bias": True, "interleaved": True, "FUNCTION": "swiglu_oai"},
        {"has_gate": False, "FUNCTION": "plain", "ACTIVATION": "relu2"},
    ]  # fmt: skip
    forms += [{"ACTIVATION": name} for name in ACTIVATIONS if name != "silu"]
    forms += [{"FUNCTION": name} for name, row in GATES.items() if row.has_up and name != "glu"]
    formed = [case for form in forms for case in with_form(cases, **form)]
    for name, scaled in SCALED.items():
        row = ROWS[scaled.format]
        cases = default_cases(arch, 32 if scaled.zeros or row.group else 64, scaled.format)
        if not (row.scaled or row.group):
            cases += default_cases(arch, 128, scaled.format)[-3:-1]
        formed += with_form(cases, weights=name)
    for name, other in PAIRS:
        both = SCALED[name].format, SCALED[other].format
        every = zip(*(default_cases(arch, 32, one, both) for one in both), strict=True)
        cases = [min(pair, key=lambda case: tile_of(case.config)) for pair in every]
        formed += with_form(cases, weights=name, up_weights=other)
    return formed


def tile_of(config: tuple[tuple[str, int], ...]) -> int:
    """Elements of a tile of weights: of two configurations kernels/paths.py takes the smaller."""
    sizes = dict(config)
    return sizes.get("BLOCK_H", 1) * sizes.get("BLOCK_I", 1)


def faults(machine: Machine, arch: int) -> list[str]:
    found = []
    if machine.stack:
        found.append(f"spills: {machine.stack} bytes on the stack")
    if machine.shared > SHARED_LIMIT[arch] * 1024:
        found.append(f"shared memory: {machine.shared} of {SHARED_LIMIT[arch] * 1024} bytes")
    return found


def main() -> int:
    """Prints every case as a row of a table; exit status 1 if any spills or asks too much.

    Arguments: architectures (75 90 ...), all by default.
    """
    begin, count, bad = time.perf_counter(), 0, 0
    print("| sm | kernel and configuration | registers | spills | shared | |")
    print("|---|---|---|---|---|---|")
    for arch in [int(word) for word in sys.argv[1:]] or ARCHITECTURES:
        for case in dict.fromkeys([*table_cases(arch), *default_cases(arch), *form_cases(arch)]):
            machine = compile_case(case, arch)
            wrong = "; ".join(faults(machine, arch))
            count, bad = count + 1, bad + bool(wrong)
            print(
                f"| {arch} | {case.label()} | {machine.registers} | {machine.stack} "
                f"| {machine.shared} | {wrong} |",
                flush=True,
            )
    print(f"\n{count} compiled, {bad} bad, {time.perf_counter() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

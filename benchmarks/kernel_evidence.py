"""Facts about the kernels' speed without a GPU: machine code, occupancy, bytes, waves.

    python -m benchmarks.kernel_evidence --json benchmarks/results/kernel_evidence.json

No GPU runs any of this and no time is measured. Three parts:
- Every kernel and configuration is compiled for every architecture: registers, spills, shared
  memory, bytes per load of the weights, and how many programs a multiprocessor can hold.
- The bytes that one decode step loads and stores, over the least that must move. They come from a
  formula that is first compared with counts from Triton's interpreter (`kernel_bytes`).
- Programs per launch, and rounds ("waves") of resident programs on named GPUs. Beside them: the
  bytes of weights that one multiprocessor has in flight, and the bytes that its share of the memory
  bandwidth needs at a latency of 800 ns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_bytes, kernel_compile
from benchmarks.common import print_table, provenance
from benchmarks.ffn_gpu import GEOMETRIES, Geometry
from moeinf.kernels import tuning

TOKENS = (1, 2, 4, 8, 16)
ROUTINGS = 16
LATENCY_NS = 800
READ_WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Chip:
    """A GPU, and the limits of one of its multiprocessors (CUDA programming guide, appendix)."""

    name: str
    arch: int
    multiprocessors: int
    gb_per_s: int
    warps: int
    blocks: int
    shared_kib: int


CHIPS = (
    Chip("T4", 75, 40, 320, 32, 16, 64),
    Chip("A100 SXM 80 GB", 80, 108, 2039, 64, 32, 164),
    Chip("RTX A5000", 86, 64, 768, 48, 16, 100),
    Chip("RTX 4090", 89, 128, 1008, 48, 24, 100),
    Chip("H100 SXM", 90, 132, 3350, 64, 32, 228),
    Chip("B200", 100, 148, 8000, 64, 32, 228),
    Chip("RTX 5090", 120, 170, 1792, 48, 24, 100),
)
BY_ARCH = {chip.arch: chip for chip in CHIPS}


def resident_programs(machine: kernel_compile.Machine, warps: int, chip: Chip) -> int:
    """Programs that fit one multiprocessor: 64 Ki registers, given out by 256 to a warp."""
    per_warp = -(-machine.registers * 32 // 256) * 256
    # From Ampere on the driver takes 1 KiB of shared memory for each program.
    shared = machine.shared + (1024 if chip.arch >= 80 else 0)
    by_shared = chip.shared_kib * 1024 // shared if shared else chip.blocks
    return min(65536 // (per_warp * warps), chip.warps // warps, chip.blocks, by_shared)


compiled = lru_cache(maxsize=None)(kernel_compile.compile_case)


def compile_rows(archs: list[int]) -> Iterator[dict[str, Any]]:
    """One row per kernel, configuration, form and architecture."""
    for arch in archs:
        cases = [
            *kernel_compile.table_cases(arch),
            *kernel_compile.default_cases(arch),
            *kernel_compile.form_cases(arch),
        ]
        for case in dict.fromkeys(cases):
            machine = compiled(case, arch)
            warps = dict(case.config).get("num_warps", 4)
            weights = [
                machine.loads[name] for name in kernel_bytes.WEIGHTS if name in machine.loads
            ]
            yield {
                "sm": arch,
                "case": case.label(),
                "registers": machine.registers,
                "spilled_bytes": machine.stack,
                "shared_bytes": machine.shared,
                "bytes_per_load_of_weights": min((min(w) for w in weights), default=None),
                "resident_warps": warps * resident_programs(machine, warps, BY_ARCH[arch]),
                "faults": kernel_compile.faults(machine, arch),
            }


def case_of(kernel: str, geometry: Geometry, arch: int) -> kernel_compile.Case:
    """The kernel as a call of that model launches it on that architecture."""
    dtype = "bfloat16" if arch >= 80 else "float16"
    config = tuning.config(
        kernel, (f"sm_{arch}", "*"), dtype=dtype,
        hidden=geometry.hidden, intermediate=geometry.intermediate,
    )  # fmt: skip
    if "ROUTES" in config:
        lanes = 1 << (geometry.top_k - 1).bit_length()
        config = {**config, "ROUTES": min(config["ROUTES"], lanes)}
    form: dict[str, Any] = {}
    if geometry.clamped:
        form = {"bias": True}
        if kernel.startswith("gate_up"):
            form |= {"interleaved": True, "FUNCTION": "swiglu_oai"}
    return kernel_compile.Case(
        kernel, dtype, tuple(config.items()), form=tuple(sorted(form.items()))
    )


def bytes_asked_ahead(case: kernel_compile.Case) -> int:
    """Bytes of weights one program has under way: a tile, or all but one of a pipeline's tiles."""
    config, form = dict(case.config), dict(case.form)
    tile = config["BLOCK_I"] * config["BLOCK_H"] * config.get("ROUTES", 1) * 2
    if case.kernel.startswith("gate_up") and form.get("has_gate", True):
        tile *= 2
    return tile * max(1, config["num_stages"] - 1)


def path_of(tokens: int, arch: int) -> str:
    return "shared" if tokens > 1 and arch >= 80 else "vector"


def steps(geometry: Geometry, tokens: int) -> list[kernel_bytes.Step]:
    """Steps with routes drawn at random, without repeats within a token."""
    make, drawn = torch.Generator().manual_seed(0), []
    for _ in range(ROUTINGS):
        noise = torch.rand(tokens, geometry.experts, generator=make)
        ids = noise.topk(geometry.top_k, dim=1).indices
        drawn.append(
            kernel_bytes.Step(
                tuple(map(tuple, ids.tolist())), geometry.hidden, geometry.intermediate,
                biased=geometry.clamped,
            )
        )  # fmt: skip
    return drawn


def byte_rows() -> Iterator[dict[str, Any]]:
    """Means over routings, with the configurations that sm_80 and later share."""
    for geometry in GEOMETRIES:
        for tokens in TOKENS:
            path = path_of(tokens, 90)
            configs = [
                dict(case_of(f"{half}_{path}", geometry, 90).config) for half in ("gate_up", "down")
            ]
            shares: dict[str, list[float]] = {}
            for step in steps(geometry, tokens):
                launches = kernel_bytes.traffic(path, step, *configs)
                values = moved(step, launches) | {"distinct": step.distinct}
                for name, value in values.items():
                    shares.setdefault(name, []).append(value)
            yield {"model": geometry.name, "tokens": tokens, "path": path} | {
                name: statistics.fmean(values) for name, values in shares.items()
            }


def moved(step: kernel_bytes.Step, launches: list[kernel_bytes.Launch]) -> dict[str, float]:
    """Bytes and their ratios to the least; `from_memory` counts what is read again from L2 once."""
    active = step.distinct * step.expert_bytes()
    weights = sum(one.loaded[name] for one in launches for name in READ_WEIGHTS)
    stored = sum(one.stored.total() for one in launches)
    once = len(step.slots) * (
        step.hidden * step.weight_size + len(step.slots[0]) * (step.id_size + step.routing_size)
    )
    loaded = sum(one.loaded.total() for one in launches)
    return {
        "least_bytes": step.least(),
        "weights_loaded_over_active_experts": weights / active,
        "from_memory_over_least": (weights + once + stored) / step.least(),
        "asked_of_l2_over_least": (loaded + stored) / step.least(),
    }


def wave_rows() -> Iterator[dict[str, Any]]:
    """Per GPU, model and decode kernel: how its programs fill the chip."""
    for chip in CHIPS:
        need = chip.gb_per_s * LATENCY_NS / chip.multiprocessors
        for geometry in GEOMETRIES:
            for tokens in (1, 8):
                path = path_of(tokens, chip.arch)
                step = steps(geometry, tokens)[0]
                cases = [case_of(f"{h}_{path}", geometry, chip.arch) for h in ("gate_up", "down")]
                launches = kernel_bytes.traffic(path, step, *(dict(c.config) for c in cases))
                for case, launch in zip(cases, launches, strict=True):
                    machine = compiled(case, chip.arch)
                    resident = resident_programs(machine, dict(case.config)["num_warps"], chip)
                    # Only a group's leader works in gate_up_shared; the others leave at once.
                    works = launch.programs
                    if case.kernel == "gate_up_shared":
                        works = works * step.distinct // (tokens * geometry.top_k)
                    held = min(resident, works / chip.multiprocessors)
                    yield {
                        "gpu": chip.name,
                        "model": geometry.name,
                        "tokens": tokens,
                        "kernel": case.kernel,
                        "programs": launch.programs,
                        "working_programs": works,
                        "resident_programs": resident,
                        "waves": works / (resident * chip.multiprocessors),
                        "bytes_under_way": held * bytes_asked_ahead(case),
                        "bytes_needed": need,
                        "registers": machine.registers,
                        "spilled_bytes": machine.stack,
                    }


def counts() -> list[dict[str, Any]]:
    """The count against the formula, in a process whose kernels are interpreted, not compiled."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_bytes"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if not run.stdout:
        raise RuntimeError(run.stderr)
    checks: list[dict[str, Any]] = json.loads(run.stdout)
    return checks


def text_of(content: dict[str, Any]) -> str:
    """JSON with one row of a table a line."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


BYTE_COLUMNS = {
    "model": ("model", ""),
    "tokens": ("T", "d"),
    "distinct": ("experts", ".1f"),
    "least_bytes": ("least bytes", ".4g"),
    "weights_loaded_over_active_experts": ("weights loaded", ".4f"),
    "from_memory_over_least": ("memory / least", ".4f"),
    "asked_of_l2_over_least": ("L2 / least", ".2f"),
}
WAVE_COLUMNS = {
    "gpu": ("GPU", ""),
    "model": ("model", ""),
    "tokens": ("T", "d"),
    "kernel": ("kernel", ""),
    "working_programs": ("programs", "d"),
    "resident_programs": ("resident", "d"),
    "waves": ("waves", ".1f"),
    "bytes_under_way": ("under way", ".0f"),
    "bytes_needed": ("needed", ".0f"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument(
        "--sm", nargs="*", type=int, default=kernel_compile.ARCHITECTURES,
        help="architectures for which everything is compiled; all by default",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    checks = counts()
    wrong = [line for check in checks for line in check["differences"]]
    for line in wrong:
        print(line)
    traffic = [rounded(row) for row in byte_rows()]
    print_table(traffic, BYTE_COLUMNS)
    waves = [rounded(row) for row in wave_rows()]
    print_table(waves, WAVE_COLUMNS)
    rows = []
    for row in compile_rows(list(options.sm)):
        rows.append(row)
        print(f"\r{len(rows)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows)} compiled, {len(bad)} with spills or too much shared memory")
    if options.json:
        content = {
            "benchmark": "kernel_evidence",
            "kind": "compile-time evidence and byte counts; no GPU ran any of this",
            **provenance(),
            "latency_ns_assumed": LATENCY_NS,
            "counted_against_formula": checks,
            "bytes": traffic,
            "waves": waves,
            "compiled": rows,
        }
        options.json.write_text(text_of(content))
    return 1 if wrong or bad else 0


if __name__ == "__main__":
    sys.exit(main())

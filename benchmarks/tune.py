"""Times block sizes on this machine's GPU and writes the fastest into kernels/tuning.json.

    python -m benchmarks.tune --models Qwen3-30B-A3B --tokens 1 16 4096
    python -m benchmarks.tune --models Qwen3-30B-A3B --formats mxfp4 fp8 --tokens 1

For each model, format and kind of call it tries the candidates of one kernel while the other
kernel keeps its choice. Compiling takes most of the time, so processes compile all candidates side
by side before any is timed. Candidates that spill, do not compile or are wrong are dropped. It adds
a row for this architecture and geometry if the best candidate is at least 3% faster than the
present row. Rows of other devices stay unchanged. Kernels are never tuned while they are used; only
this program times them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks import ffn_gpu, formats_gpu
from benchmarks.common import print_table
from moeinf.kernels import ExpertForm, launch_plan, paths, tuning
from moeinf.kernels.checks import check_arguments

GAIN = 1.03
KEPT = ("dtype", "hidden", "intermediate", "order", "weights")  # of a question, in a row
WARPS, DEEP = (4, 8), (3, 4, 5, 6)
# Elements of a tile for each thread of a vector kernel: fewer leave too little under way, more do
# not fit into registers.
PER_THREAD = (8, 32)


def grid(**axes: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def fits_threads(config: dict[str, int]) -> bool:
    sizes = (config[name] for name in ("ROUTES", "BLOCK_H", "BLOCK_I") if name in config)
    each = math.prod(sizes) // (32 * config["num_warps"])
    return PER_THREAD[0] <= each <= PER_THREAD[1]


def candidates(kernel: str, order: str, rows: int) -> list[dict[str, int]]:
    """Configurations worth timing; `rows` is BLOCK_M of the prefill kernels."""
    vector: dict[str, tuple[int, ...]] = {
        "STAGES": (1,),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    }
    by_rows, short = order == "rows", (1, 2, 4, 8)
    if kernel == "gate_up_vector":
        blocks = {"BLOCK_I": short, "BLOCK_H": (256, 512, 1024, 2048)}
        if not by_rows:
            blocks = {"BLOCK_I": (16, 32), "BLOCK_H": (64, 128)}
        return [config for config in grid(**blocks, **vector) if fits_threads(config)]
    if kernel == "down_vector":
        blocks = {"BLOCK_H": short, "BLOCK_I": (256, 512, 1024)}
        if not by_rows:
            blocks = {"BLOCK_H": (16, 32), "BLOCK_I": (64, 128)}
        return [c for c in grid(ROUTES=(2, 4), **blocks, **vector) if fits_threads(c)]
    if kernel == "gate_up_shared":
        return grid(BLOCK_I=(16, 32), BLOCK_H=(64, 128, 256), num_warps=WARPS, num_stages=DEEP)
    if kernel == "down_shared":
        return grid(BLOCK_H=(16, 32), BLOCK_I=(128, 256), num_warps=WARPS, num_stages=DEEP)
    grouped: dict[str, tuple[int, ...]] = {"BLOCK_M": (rows,)}
    if kernel == "gate_up_grouped":
        grouped |= {"BLOCK_I": (64, 128), "BLOCK_H": (32, 64, 128)}
    else:
        grouped |= {"BLOCK_H": (64, 128, 256), "BLOCK_I": (32, 64, 128)}
    return grid(**grouped, GROUP=(4, 8), num_warps=WARPS, num_stages=(3, 4))


def kernels_of(path: str) -> tuple[str, str]:
    return f"gate_up_{path}", f"down_{path}"


def questions(layer: formats_gpu.Packed, call: ffn_gpu.Call) -> dict[str, dict[str, Any]]:
    """The two kernels of a call, and what the table is asked for each."""
    arguments = check_arguments(
        call.hidden, call.ids, None, layer.matrices, ExpertForm(), None, layer.geometry.experts
    )
    path = paths.pick_path(arguments)
    rows = paths.rows_per_tile(arguments) if path == "grouped" else 0
    return {kernel: paths.tuning_key(kernel, arguments, rows) for kernel in kernels_of(path)}


def new_row(
    kernel: str, device: str, asked: dict[str, Any], config: dict[str, int]
) -> dict[str, Any]:
    """A row of the table that answers exactly this question on this architecture."""
    row: dict[str, Any] = {"kernel": kernel, "device": device}
    row |= {name: asked[name] for name in KEPT}
    if asked["rows_per_tile"]:
        row["rows"] = asked["rows_per_tile"]
    return row | {"config": config}


def merged(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with `found` added; a row for the same question is replaced."""

    def question(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted((name, value) for name, value in row.items() if name != "config"))

    answers = {question(row): row for row in rows}
    answers |= {question(row): row for row in found}
    return list(answers.values())


def table_text(rows: list[dict[str, Any]]) -> str:
    """The table as it is committed: one row a line."""
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    return f'{{\n  "format": "{tuning.FORMAT}",\n  "rows": [\n{lines}\n  ]\n}}\n'


def write_table(rows: list[dict[str, Any]]) -> None:
    tuning.TABLE.write_text(table_text(rows))
    tuning.rows.cache_clear()
    tuning.config.cache_clear()
    launch_plan.PLANS.clear()


def microseconds(
    layer: formats_gpu.Packed, inputs: list[ffn_gpu.Call], want: torch.Tensor
) -> float | None:
    """Time of a call in a graph; None if this configuration cannot run or is wrong."""
    try:
        found = layer.run(inputs[0])[: len(want)].double()
        if not (found - want).norm() <= formats_gpu.TOLERANCE * want.norm():
            return None
        return ffn_gpu.graph_microseconds(layer.run, inputs)
    except Exception as problem:  # what a compiler or a launch may raise has no common type
        print(f"  left out: {str(problem).splitlines()[0]}")
        return None


def trials(
    layer: formats_gpu.Packed, call: ffn_gpu.Call, device: str
) -> dict[str, list[dict[str, Any]]]:
    """For each kernel of a call, a row of the table for each of its candidates."""
    return {
        kernel: [
            new_row(kernel, device, asked, config)
            for config in candidates(kernel, asked["order"], asked["rows_per_tile"])
        ]
        for kernel, asked in questions(layer, call).items()
    }


def compile_rows(
    name: str, geometry: ffn_gpu.Geometry, tokens: int, rows: list[dict[str, Any]]
) -> None:
    """Leaves the kernels of these rows in Triton's cache. Runs in a process of its own, with few
    experts: their number is no part of a kernel."""
    small = replace(geometry, experts=max(geometry.top_k, 8))
    here = torch.device("cuda", torch.cuda.current_device())
    layer = formats_gpu.Packed(formats_gpu.FORMATS_TIMED[name], small, here)
    call = ffn_gpu.calls(layer, tokens, 1)[0]
    layer.geometry = geometry  # the number of its experts chooses the size of tiles
    before = list(tuning.rows())
    for row in rows:
        use_rows(merged(before, [row]))
        try:
            layer.run(call)
        except Exception:  # it is left out with its reason when it is timed
            continue


def tune(
    layer: formats_gpu.Packed, tokens: int, every: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Rows that beat the table for this call, found one kernel after the other."""
    inputs = ffn_gpu.calls(layer, tokens, 32 if tokens <= paths.DECODE_TOKENS else 4)
    want = layer.expected(inputs[0], min(tokens, 2))
    found: list[dict[str, Any]] = []
    before = list(tuning.rows())
    for kernel, rows in every.items():
        now = microseconds(layer, inputs, want)
        best = (now or float("inf"), None)
        for row in rows:
            use_rows(merged(before + found, [row]))
            took = microseconds(layer, inputs, want)
            if took is not None and took * GAIN < best[0]:
                best = (took, row)
        if best[1] is not None:
            found.append(best[1])
        use_rows(merged(before, found))
        print_table(
            [{"kernel": kernel, "tokens": tokens, "before": now, "after": best[0],
              "config": str((best[1] or {}).get("config", "as before"))}],
            {"kernel": ("kernel", ""), "tokens": ("T", "d"), "before": ("us before", ".1f"),
             "after": ("us after", ".1f"), "config": ("configuration", "")},
        )  # fmt: skip
    return found


def use_rows(rows: list[dict[str, Any]]) -> None:
    """Makes lookups answer from these rows until the table is read again."""
    tuning.rows = lambda: tuple(rows)  # type: ignore[assignment]
    tuning.config.cache_clear()
    launch_plan.PLANS.clear()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="names of geometries; all by default")
    parser.add_argument(
        "--formats", nargs="*", choices=[*formats_gpu.FORMATS_TIMED], default=["bf16"]
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 512, 4096))
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    here = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(here)
    read = tuning.rows
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for geometry, name in itertools.product(ffn_gpu.GEOMETRIES, options.formats):
            if options.models and geometry.name not in options.models:
                continue
            layer = formats_gpu.Packed(formats_gpu.FORMATS_TIMED[name], geometry, here)
            for tokens in options.tokens:
                every = trials(layer, ffn_gpu.calls(layer, tokens, 1)[0], f"sm_{major}{minor}")
                rows = [row for some in every.values() for row in some]
                shares = [rows[n :: options.jobs] for n in range(options.jobs)]
                waits = [
                    pool.submit(compile_rows, name, geometry, tokens, share)
                    for share in shares
                    if share
                ]
                for wait in waits:
                    wait.result()
                print(f"{geometry.name}, {name}, {tokens} tokens: {len(rows)} candidates")
                found += tune(layer, tokens, every)
                tuning.rows = read
                write_table(merged(list(tuning.rows()), found))
            del layer
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

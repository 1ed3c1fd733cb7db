"""Times block sizes on this machine's GPU and writes the fastest into kernels/tuning.json.

    python -m benchmarks.tune --models Qwen3-30B-A3B --tokens 1 16 4096

For each model and kind of call it tries the candidates of one kernel while the other kernel keeps
its choice. Candidates that spill or do not compile are dropped. It adds a row for this architecture
and geometry if the best candidate is at least 3% faster than the present row. Rows of other devices
stay unchanged. Kernels are never tuned while they are used; only this program times them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

import torch

from benchmarks import ffn_gpu
from benchmarks.common import print_table
from moeinf.kernels import launch_plan, paths, tuning
from moeinf.kernels.checks import check_arguments

GAIN = 1.03
WARPS, DEEP = (4, 8), (3, 4, 5, 6)


def grid(**axes: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def candidates(kernel: str, order: str, rows: int) -> list[dict[str, int]]:
    """Configurations worth timing; `rows` is BLOCK_M of the prefill kernels."""
    if kernel == "gate_up_vector":
        long, short = ((128, 256, 512), (2, 4, 8, 16)) if order == "rows" else ((8, 16), (64, 128))
        return grid(
            BLOCK_I=short, BLOCK_H=long, STAGES=(1, 3), num_warps=(2, 4, 8), num_stages=(1,)
        )
    if kernel == "down_vector":
        long, short = ((128, 256, 512), (1, 2, 4, 8)) if order == "rows" else ((8, 16), (32, 64))
        return grid(
            ROUTES=(2, 4), BLOCK_H=short, BLOCK_I=long, STAGES=(1, 3), num_warps=(2, 4, 8),
            num_stages=(1,),
        )  # fmt: skip
    if kernel == "gate_up_shared":
        return grid(BLOCK_I=(16, 32), BLOCK_H=(64, 128, 256), num_warps=WARPS, num_stages=DEEP)
    if kernel == "down_shared":
        return grid(BLOCK_H=(16, 32), BLOCK_I=(128, 256), num_warps=WARPS, num_stages=DEEP)
    blocks: dict[str, tuple[int, ...]] = {"BLOCK_M": (rows,)}
    if kernel == "gate_up_grouped":
        blocks |= {"BLOCK_I": (64, 128), "BLOCK_H": (32, 64, 128)}
    else:
        blocks |= {"BLOCK_H": (64, 128, 256), "BLOCK_I": (32, 64, 128)}
    return grid(**blocks, GROUP=(4, 8), num_warps=WARPS, num_stages=(3, 4))


def kernels_of(path: str) -> tuple[str, str]:
    return f"gate_up_{path}", f"down_{path}"


def questions(layer: ffn_gpu.Layer, call: ffn_gpu.Call) -> dict[str, dict[str, Any]]:
    """The two kernels of a call, and what the table is asked for each."""
    arguments = check_arguments(
        call.hidden, call.ids, None, layer.matrices, layer.form, None, layer.geometry.experts
    )
    path = paths.pick_path(arguments)
    rows = paths.rows_per_tile(arguments) if path == "grouped" else 0
    return {kernel: paths.tuning_key(kernel, arguments, rows) for kernel in kernels_of(path)}


def new_row(
    kernel: str, device: str, asked: dict[str, Any], config: dict[str, int]
) -> dict[str, Any]:
    """A row of the table that answers exactly this question on this architecture."""
    row: dict[str, Any] = {"kernel": kernel, "device": device}
    row |= {name: asked[name] for name in ("dtype", "hidden", "intermediate", "order")}
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


def microseconds(layer: ffn_gpu.Layer, inputs: list[ffn_gpu.Call]) -> float | None:
    """Time of a call in a graph; None if this configuration cannot run or is wrong."""
    _, run = next(ffn_gpu.implementations(layer, inputs[0].hidden.shape[0]))
    try:
        if not ffn_gpu.relative_error(layer, run, inputs[0]) <= ffn_gpu.TOLERANCE:
            return None
        return ffn_gpu.graph_microseconds(run, inputs)
    except Exception as problem:  # what a compiler or a launch may raise has no common type
        print(f"  left out: {str(problem).splitlines()[0]}")
        return None


def tune(layer: ffn_gpu.Layer, tokens: int, device: str) -> list[dict[str, Any]]:
    """Rows that beat the table for this call, found one kernel after the other."""
    inputs = ffn_gpu.calls(layer, tokens, 32 if tokens <= paths.DECODE_TOKENS else 4)
    found: list[dict[str, Any]] = []
    before = list(tuning.rows())
    for kernel, asked in questions(layer, inputs[0]).items():
        now = microseconds(layer, inputs)
        best = (now or float("inf"), None)
        for config in candidates(kernel, asked["order"], asked["rows_per_tile"]):
            row = new_row(kernel, device, asked, config)
            use_rows(merged(before + found, [row]))
            took = microseconds(layer, inputs)
            if took is not None and took * GAIN < best[0]:
                best = (took, row)
        if best[1] is not None:
            found.append(best[1])
        use_rows(merged(before, found))
        print_table(
            [{"kernel": kernel, "tokens": tokens, "before": now, "after": best[0]}],
            {"kernel": ("kernel", ""), "tokens": ("T", "d"), "before": ("us before", ".1f"),
             "after": ("us after", ".1f")},
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
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 512, 4096))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    here = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(here)
    read = tuning.rows
    found: list[dict[str, Any]] = []
    for geometry in ffn_gpu.GEOMETRIES:
        if options.models and geometry.name not in options.models:
            continue
        layer = ffn_gpu.Layer(geometry, here, torch.bfloat16)
        for tokens in options.tokens:
            found += tune(layer, tokens, f"sm_{major}{minor}")
            tuning.rows = read
            write_table(merged(list(tuning.rows()), found))
        del layer
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

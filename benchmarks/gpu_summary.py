"""The table at the end of gpu_session.sh, made from the JSON files that the session wrote.

    python -m benchmarks.gpu_summary FOLDER GPU

Each row is one target of the project: the measured value, the target, and whether it is met. A row
without a measurement, because a step failed or ran out of time, says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import print_table

Row = dict[str, Any]
COLUMNS = {
    "what": ("what", ""),
    "measured": ("measured", ""),
    "mark": ("mark", ""),
    "reached": ("", ""),
}
DECODE = (1, 2, 4, 8, 16)
LARGE, SMALL = 50.0, 5.0  # MB of active experts


def row(what: str, value: float | None, mark: float, least: bool = True) -> Row:
    """A mark that is a least value, or a greatest one."""
    if value is None:
        return {"what": what, "measured": "not measured", "mark": f"{mark:g}", "reached": ""}
    reached = value >= mark if least else value <= mark
    return {
        "what": what,
        "measured": f"{value:.3g}",
        "mark": f"{'>=' if least else '<='} {mark:g}",
        "reached": "yes" if reached else "NO",
    }


def least_of(rows: list[Row], name: str) -> float | None:
    return min((r[name] for r in rows if r.get(name) is not None), default=None)


def greatest_of(rows: list[Row], name: str) -> float | None:
    return max((r[name] for r in rows if r.get(name) is not None), default=None)


def best_time(result: Row) -> float | None:
    times = [result[n] for n in ("us_launched", "us_graph") if result.get(n) is not None]
    return min(times, default=None)


def least_lead(rows: list[Row]) -> float | None:
    """Over all models and token counts: the fastest rival's time over ours, where least."""
    leads = []
    for ours in (r for r in rows if r["implementation"] == "ours"):
        same = [r for r in rows if (r["model"], r["tokens"]) == (ours["model"], ours["tokens"])]
        rivals = [best_time(r) for r in same if r["implementation"] not in ("ours", "vllm")]
        fastest = min((t for t in rivals if t is not None), default=None)
        mine = best_time(ours)
        if fastest is not None and mine is not None:
            leads.append(fastest / mine)
    return min(leads, default=None)


def ffn_rows(result: Row) -> list[Row]:
    rows = result.get("rows", [])
    ours = [r for r in rows if r["implementation"] == "ours"]
    failed = [f"{r['model']} T={r['tokens']}" for r in ours if "failed" in r]
    one = [r for r in ours if r["tokens"] == 1]
    decode = [r for r in ours if r["tokens"] in DECODE]
    share = "share_of_bandwidth"
    table = [
        row("one token, 50 MB and more: of bandwidth, least",
            least_of([r for r in one if r["megabytes"] >= LARGE], share), 0.75),
        row("one token, 5 to 50 MB: of bandwidth, least",
            least_of([r for r in one if SMALL <= r["megabytes"] < LARGE], share), 0.5),
        row("4096 tokens: of the matmul rate, least",
            least_of([r for r in ours if r["tokens"] == 4096], "share_of_matmul"), 0.6),
        row("fastest of transformers / ours, least", least_lead(rows), 1.0),
        row("launches at decode, most", greatest_of(decode, "launches"), 2, least=False),
        row("relative error in bf16, most", greatest_of(ours, "error"), 5e-3, least=False),
    ]  # fmt: skip
    if failed:
        table.append({"what": "failed: " + ", ".join(failed), "reached": "NO"})
    return table


def copy_rows(result: Row) -> list[Row]:
    rows = result.get("rows", [])
    nine = [r for r in rows if 9 <= r["megabytes"] < 10]
    return [
        row("9 MB experts to the GPU: of the pinned peak", least_of(nine, "of_peak"), 0.95),
        row("host us per resident step, most", greatest_of(rows, "host_us"), 30, least=False),
    ]


def decode_rows(result: Row) -> list[Row]:
    rows = result.get("rows", [])
    return [
        row("decode step: time over its roofline, most", greatest_of(rows, "over_roofline"), 1.15,
            least=False)
    ]  # fmt: skip


def format_rows(result: Row) -> list[Row]:
    rows = result.get("rows", [])
    failed = [f"{r['format']} T={r['tokens']}" for r in rows if "failed" in r]
    table = [
        row(f"packed formats, {tokens} tokens: bf16's time over theirs, least",
            least_of([r for r in rows if r["tokens"] == tokens and r["format"] != "bf16"],
                     "times_bf16"), mark)
        for tokens, mark in ((1, 1.0), (512, 0.8))
    ]  # fmt: skip
    if failed:
        table.append({"what": "failed: " + ", ".join(failed), "reached": "NO"})
    return table


def read(folder: Path, name: str, gpu: str) -> Row:
    try:
        found: Row = json.loads((folder / f"{name}-{gpu}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def summary(folder: Path, gpu: str) -> list[Row]:
    table: list[Row] = []
    for path in sorted((folder / "logs").glob("tests-*.txt")):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        # pytest ends with its counts; a run that was cut off does not.
        last = next(
            (x.strip("= ") for x in reversed(lines) if " passed" in x or " failed" in x), ""
        )
        good = bool(last) and "failed" not in last and "error" not in last
        table.append(
            {"what": path.stem.replace("-", ": "), "measured": last or "did not end",
             "mark": "all pass", "reached": "yes" if good else "NO"}
        )  # fmt: skip
    table += ffn_rows(read(folder, "ffn_gpu", gpu))
    table += format_rows(read(folder, "formats_gpu", gpu))
    table += copy_rows(read(folder, "copy_gpu", gpu))
    table += decode_rows(read(folder, "decode_gpu", gpu))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="of the JSON files and, in logs/, what the tests printed"
    )
    parser.add_argument("gpu", help="the name in their file names")
    options = parser.parse_args(arguments)
    limits = read(options.folder, "ffn_gpu", options.gpu).get("limits", {})
    if limits.get("bytes_per_s"):
        print(
            f"{options.gpu}: {limits['bytes_per_s'] / 1e9:.0f} GB/s, "
            f"{limits['flop_per_s'] / 1e12:.0f} TFLOP/s in bf16, as measured\n"
        )
    print_table(summary(options.folder, options.gpu), COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

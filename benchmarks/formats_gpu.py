"""Packed experts on a GPU, against its measured memory bandwidth and against bf16.

    python -m benchmarks.formats_gpu --json benchmarks/results/formats_gpu.json

Geometry of Qwen3-30B-A3B by default. Every format holds random codes and scales that keep the sums
small. Each result is first compared with float64 products of the decoded weights; a wrong one gets
no time. Bytes that must move: every distinct expert of a call once, in its packed size. Calls
differ, so what one reads has left the L2 cache before it is read again, as in ffn_gpu. Times are
medians over a CUDA graph of all calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks import ffn_gpu, roofline_gpu
from benchmarks.common import print_table, write_json
from benchmarks.packed_weights import SCALED, fill_like_weights
from moeinf.checkpoint.formats import FORMATS, MULTIPLIER, SCALES, VALUES, ZEROS, WeightFormat
from moeinf.checkpoint.layout import Layout
from moeinf.kernels import ExpertForm, fused_experts

TOKENS = (1, 16, 512)
TOLERANCE = 1e-2  # of a result in bf16 against float64, by norm
FORMATS_TIMED = {
    "bf16": FORMATS["bf16"],
    "bf16-palette": FORMATS["palette7"],
    **SCALED,
    "int4-128-zeros": FORMATS["int4"].with_scales("bf16", (1, 128), zeros=True),
}


class Packed:
    """All experts of one layer in slots, with the same bytes in each."""

    def __init__(self, row: WeightFormat, geometry: ffn_gpu.Geometry, device: torch.device) -> None:
        self.row, self.geometry, self.device = row, geometry, device
        self.dtype = torch.bfloat16
        self.layout = Layout.of(ExpertForm(), row, geometry.hidden, geometry.intermediate)
        count = geometry.experts
        self.pool = torch.empty(count, self.layout.slot_bytes, dtype=torch.uint8, device=device)
        one = torch.empty(self.layout.slot_bytes, dtype=torch.uint8)
        for name, view in self.layout.views(one[None]).items():
            if row.name == "bf16":
                view.normal_(std=view.shape[-1] ** -0.5)
            else:
                fill_like_weights(name, row, view)
        self.pool.copy_(one.expand_as(self.pool))
        self.matrices = self.layout.matrices(self.pool)

    def expected(self, call: ffn_gpu.Call, tokens: int) -> torch.Tensor:
        """float64 [tokens, H], route by route."""
        ids = call.ids[:tokens]
        dense = {e: self.dense(e) for e in ids.unique().tolist()}
        out = torch.zeros(tokens, self.geometry.hidden, dtype=torch.float64, device=self.device)
        for t in range(tokens):
            x = call.hidden[t].double()
            for e, weight in zip(ids[t].tolist(), call.weights[t].double(), strict=True):
                gate, up, down = dense[e]
                inner = torch.nn.functional.silu(gate @ x) * (up @ x)
                out[t] += weight * (down @ inner)
        return out

    def dense(self, e: int) -> list[torch.Tensor]:
        found = []
        for matrix in (self.matrices.gate, self.matrices.up, self.matrices.down):
            pieces = {VALUES: matrix.values, SCALES: matrix.scales, ZEROS: matrix.zeros,
                      MULTIPLIER: matrix.multiplier}  # fmt: skip
            parts = {name: tensor[e] for name, tensor in pieces.items() if tensor is not None}
            found.append(self.row.dequantise(parts))
        return found

    def run(self, call: ffn_gpu.Call) -> torch.Tensor:
        return fused_experts(
            call.hidden, call.ids, call.weights, self.matrices, ExpertForm(),
            num_experts=self.geometry.experts, check_ids=False,
        )  # fmt: skip


def measure(
    name: str, packed: Packed, tokens: int, count: int, bandwidth: float | None
) -> dict[str, Any]:
    inputs = ffn_gpu.calls(packed, tokens, count)  # type: ignore[arg-type]
    moved = statistics.median(
        call.distinct * packed.layout.nbytes + 4 * tokens * packed.geometry.hidden
        for call in inputs
    )
    row: dict[str, Any] = {"format": name, "tokens": tokens, "megabytes": moved / 1e6}
    try:
        some = min(tokens, 2)
        want = packed.expected(inputs[0], some)
        found = packed.run(inputs[0])[:some].double()
        row["error"] = float((found - want).norm() / want.norm())
        if not row["error"] <= TOLERANCE:
            return row | {"failed": "wrong result"}
        if packed.device.type == "cuda":
            row["us"] = ffn_gpu.graph_microseconds(packed.run, inputs)
        row["us"] = row.get("us") or ffn_gpu.launched_microseconds(
            packed.run, inputs, packed.device
        )
    except Exception as problem:  # what a compiler or a launch may raise has no common type
        return row | {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]}
    row["gb_per_s"] = moved / row["us"] / 1e3
    if bandwidth:
        row["share_of_bandwidth"] = row["gb_per_s"] * 1e9 / bandwidth
    return row


COLUMNS = {
    "format": ("format", ""),
    "tokens": ("T", "d"),
    "megabytes": ("MB", ".1f"),
    "us": ("us", ".1f"),
    "gb_per_s": ("GB/s", ".0f"),
    "share_of_bandwidth": ("of bandwidth", ".2f"),
    "times_bf16": ("times bf16", ".2f"),
    "error": ("error", ".1e"),
    "failed": ("", ""),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="name of a geometry of ffn_gpu")
    parser.add_argument("--formats", nargs="*", choices=[*FORMATS_TIMED], default=[*FORMATS_TIMED])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--calls", type=int, default=32, help="different calls per measurement")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args(arguments)
    bandwidth = None
    geometry = next((g for g in ffn_gpu.GEOMETRIES if g.name == options.model), None)
    if geometry is None:
        parser.error(f"unknown model {options.model!r}")
    if options.dry_run:
        device, geometry = torch.device("cpu"), ffn_gpu.Geometry("tiny", 256, 256, 6, 2)
    elif not torch.cuda.is_available():
        print("skipped: no CUDA device")
        if options.json:
            write_json(options.json, "formats_gpu", skipped="no CUDA device")
        return 0
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        bandwidth = roofline_gpu.memory_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for name in options.formats:
        packed = Packed(FORMATS_TIMED[name], geometry, device)
        for tokens in options.tokens:
            count = options.calls if tokens <= 16 else min(options.calls, 4)
            row = measure(name, packed, tokens, count, bandwidth)
            plain = next(
                (r for r in rows if (r["format"], r["tokens"]) == ("bf16", tokens)), {}
            ).get("us")
            if plain and row.get("us"):
                row["times_bf16"] = plain / row["us"]
            rows.append(row)
            print_table([row], COLUMNS)  # each at once, for sessions end when their time is up
        if options.json:
            limits = {"bytes_per_s": bandwidth}
            write_json(
                options.json, "formats_gpu", model=geometry.name, limits=limits,
                dry_run=options.dry_run, rows=rows,
            )  # fmt: skip
        del packed
    print_table(rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

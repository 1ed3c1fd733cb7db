"""The expert FFN on the CPU, against this machine's read bandwidth and against transformers.

    python benchmarks/ffn_cpu.py --json benchmarks/results/ffn_cpu.json

Geometry of Qwen3-30B-A3B: hidden 2048, intermediate 768, 128 experts, top-8, bf16. Bytes that must
move: every distinct expert of the call once, 9.4 MB each (T=1: 75.5 MB). FLOPs: 6 * T * k * H * I.
All 128 experts take 1.2 GB. Calls of one token use them in turn, other calls use random ones, so
the last-level cache holds almost nothing that the next call needs.

One round measures the limit (a plain read by all threads, the best of its patterns), ours, and each
implementation of transformers on a Qwen3MoeExperts module with the same weights. All memory is in
huge pages. Rounds repeat for --seconds. Each column is its best time, because other work on the
machine can only make a run slower. Before ours and before the limit, the benchmark waits until
torch's OpenMP threads have stopped spinning. Ours is compared with `eager` before the timing.

`--format` times packed weights against bf16, and with `--llama-python` against llama.cpp's kernels
on the nearest of its types (ggml_child.py), as they are and repacked for this processor. There one
token's time is a mean over 16 layers, which visit every expert once, for both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import ROOT, print_table, write_json
from benchmarks.packed_weights import SCALED, fill_like_weights
from moeinf import _core
from moeinf.checkpoint.formats import FORMATS, WeightFormat
from moeinf.checkpoint.layout import Layout
from moeinf.experts.cpu import core_expert
from moeinf.kernels.forms import ExpertForm
from moeinf.memory_read import HugeArea, ReadLimit

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
SEGMENTS = [2 * INTERMEDIATE * HIDDEN * 2, HIDDEN * INTERMEDIATE * 2]  # bytes of gate_up, down
SLOT_BYTES = sum(SEGMENTS)
FORMATS_TIMED = {"bf16-palette": FORMATS["palette7"], **SCALED}
THEIRS = ["eager", "grouped_mm", "batched_mm"]
# batched_mm copies the experts of every route: beyond this many bytes it is not worth waiting for.
MOST_GATHERED = 2 << 30
PAUSE = 0.01  # seconds


def random_weights() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 gate_up [E, 2I, H] and down [E, H, I], in huge pages: one random expert, scaled anew."""
    views = []
    for rows, columns in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        area = HugeArea(EXPERTS * rows * columns * 2)
        views.append(area.bytes.view(torch.bfloat16).view(EXPERTS, rows, columns))
        base = torch.randn(rows, columns) / columns**0.5
        for expert in range(EXPERTS):
            views[-1][expert] = (base * (1 + expert / EXPERTS)).bfloat16()
    return views[0], views[1]


class Call:
    """One call's inputs: hidden [T, H] and weights [T, k] in bf16, ids [T, k] in int64."""

    def __init__(self, tokens: int, first: int | None = None) -> None:
        self.x = torch.randn(tokens, HIDDEN).bfloat16()
        if first is None:
            self.ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
        else:
            self.ids = (torch.arange(TOP_K) + first)[None] % EXPERTS
        self.weights = torch.rand(tokens, TOP_K).softmax(-1).bfloat16()
        self.out = torch.empty_like(self.x)
        self.nbytes = len(self.ids.unique()) * SLOT_BYTES
        self.flops = 6 * tokens * TOP_K * HIDDEN * INTERMEDIATE
        self.input = _core.FfnInput(
            hidden=self.x.data_ptr(),
            hidden_dtype=_core.DType.bf16,
            topk_ids=self.ids.data_ptr(),
            ids_are_int64=True,
            topk_weights=self.weights.data_ptr(),
            topk_weights_dtype=_core.DType.bf16,
            tokens=tokens,
            top_k=TOP_K,
            num_experts=EXPERTS,
        )


class Ours:
    """All experts in slots of one arena."""

    LAYOUT = Layout.of(ExpertForm(), FORMATS["bf16"], HIDDEN, INTERMEDIATE)
    EXPERT = core_expert(ExpertForm(), LAYOUT)

    def __init__(self, engine: _core.CpuEngine, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.engine = engine
        self.arena = HugeArea(EXPERTS * self.LAYOUT.slot_bytes).bytes
        views = self.LAYOUT.views(self.arena.view(EXPERTS, -1))
        views["gate_up"].copy_(gate_up)
        views["down"].copy_(down)
        self.slots = [self.arena.data_ptr() + e * self.LAYOUT.slot_bytes for e in range(EXPERTS)]

    def __call__(self, call: Call) -> torch.Tensor:
        _core.fused_experts_raw(
            self.engine,
            self.EXPERT,
            call.input,
            slots=self.slots,
            out=call.out.data_ptr(),
            out_dtype=_core.DType.bf16,
        )
        return call.out


def transformers_experts(
    name: str, gate_up: torch.Tensor, down: torch.Tensor
) -> Callable[[Call], torch.Tensor]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return lambda call: module(call.x, call.ids, call.weights)


class Scaled:
    """All experts in one format with scales that keep the sums small."""

    def __init__(self, engine: _core.CpuEngine, row: WeightFormat) -> None:
        self.engine = engine
        self.layout = Layout.of(ExpertForm(), row, HIDDEN, INTERMEDIATE)
        self.expert = core_expert(ExpertForm(), self.layout)
        self.arena = HugeArea(EXPERTS * self.layout.slot_bytes).bytes
        slots = self.arena.view(EXPERTS, -1)
        for piece, view in self.layout.views(slots).items():
            fill_like_weights(piece, row, view[0])
        slots[1:] = slots[0]
        self.slots = [slot.data_ptr() for slot in slots]

    def __call__(self, call: Call) -> None:
        _core.fused_experts_raw(
            self.engine,
            self.expert,
            call.input,
            slots=self.slots,
            out=call.out.data_ptr(),
            out_dtype=_core.DType.bf16,
        )


NEAREST = {
    "fp8": "Q8_0", "fp8-channel": "Q8_0", "mxfp8": "Q8_0", "int8": "Q8_0",
    "mxfp4": "MXFP4", "nvfp4": "Q4_0", "int4-32": "Q4_0", "int4-128": "Q4_0",
    "gguf-mxfp4": "MXFP4", "bf16-palette": "BF16",
}  # fmt: skip


class Llama:
    """llama.cpp's kernels on the same geometry, in a process of its own for each arrangement."""

    def __init__(self, python: Path, name: str, tokens: int, threads: int) -> None:
        self.type = NEAREST.get(name, name.upper())
        self.best: dict[str, float] = {}
        self.children: dict[str, subprocess.Popen[str]] = {}
        for kind in ("plain", "repacked"):
            job = {"type": self.type, "tokens": tokens, "hidden": HIDDEN, "top_k": TOP_K,
                   "intermediate": INTERMEDIATE, "experts": EXPERTS, "threads": threads,
                   "repacked": kind == "repacked"}  # fmt: skip
            child = subprocess.Popen(
                [python, ROOT / "benchmarks" / "ggml_child.py"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert child.stdin is not None and child.stdout is not None
            print(json.dumps(job), file=child.stdin, flush=True)
            if child.stdout.readline() == "ready\n":  # it ends where it cannot repack a type
                self.children[kind] = child
            elif kind == "plain":
                raise SystemExit(f"llama.cpp cannot compute {self.type}")

    def measure(self) -> None:
        for kind, child in self.children.items():
            assert child.stdin is not None and child.stdout is not None
            print(file=child.stdin, flush=True)
            self.best[kind] = min(self.best.get(kind, float("inf")), float(child.stdout.readline()))
            time.sleep(PAUSE)

    def close(self) -> None:
        for child in self.children.values():
            child.communicate()


def measure_format(
    name: str, tokens: int, seconds: float, scaled: Scaled, ours: Ours, llama: Llama | None
) -> dict[str, float | int | str | None]:
    """One row: a format with scales against the read limit, bf16 and llama.cpp, in turn."""
    calls = [Call(tokens, i * TOP_K if tokens == 1 else None) for i in range(16)]
    limit = ReadLimit(ours.engine, ours.arena)
    best = {"scaled": float("inf"), "bf16": float("inf")}
    against_llama = float("inf")
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 8:
        limit.measure()
        for kind, work in (("scaled", scaled), ("bf16", ours)):
            for _ in range(4 if tokens <= 16 else 1):
                call = calls[turn % len(calls)]
                best[kind] = min(best[kind], seconds_of(lambda call=call, work=work: work(call)))
                turn += 1
        if llama is not None:
            llama.measure()
            some = calls if tokens == 1 else calls[:1]
            taken = seconds_of(lambda some=some: [scaled(call) for call in some]) / len(some)
            against_llama = min(against_llama, taken)
    experts = statistics.fmean(len(call.ids.unique()) for call in calls)
    rate = experts * scaled.layout.nbytes / best["scaled"]
    return {
        "format": name,
        "tokens": tokens,
        "expert_bytes": scaled.layout.nbytes,
        "ms": best["scaled"] * 1e3,
        "gb_per_s": rate / 1e9,
        "limit_gb_per_s": limit.best / 1e9,
        "share_of_limit": rate / limit.best,
        "speedup_over_bf16": best["bf16"] / best["scaled"],
        **(against(llama, against_llama) if llama is not None else {}),
    }


def against(llama: Llama, ours: float) -> dict[str, float | str | None]:
    kind, fastest = min(llama.best.items(), key=lambda one: one[1])
    return {
        "llama_type": llama.type if kind == "plain" else f"{llama.type} {kind}",
        "llama_plain_ms": llama.best["plain"] * 1e3,
        "llama_repacked_ms": llama.best["repacked"] * 1e3 if "repacked" in llama.best else None,
        "speedup_over_llama": fastest / ours,
    }


FORMAT_COLUMNS = {
    "format": ("format", "s"),
    "tokens": ("T", "d"),
    "ms": ("ms", ".2f"),
    "gb_per_s": ("GB/s", ".1f"),
    "limit_gb_per_s": ("limit", ".1f"),
    "share_of_limit": ("share", ".2f"),
    "speedup_over_bf16": ("times bf16", ".2f"),
}
LLAMA_COLUMNS = {
    "llama_type": ("llama.cpp", "s"),
    "llama_plain_ms": ("ms", ".2f"),
    "llama_repacked_ms": ("repacked", ".2f"),
    "speedup_over_llama": ("times llama.cpp", ".2f"),
}


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    tokens: int,
    seconds: float,
    ours: Ours,
    theirs: dict[str, Callable[[Call], torch.Tensor]],
) -> dict[str, float | int | None]:
    """One row of the table."""
    calls = [Call(tokens, i * TOP_K if tokens == 1 else None) for i in range(16)]
    expected = theirs["eager"](calls[0]).float()
    error = float((ours(calls[0]).float() - expected).abs().max() / expected.abs().max())
    if not error < 0.02:
        raise SystemExit(f"T={tokens}: our result is off by {error:.3g} of eager's largest value")

    limit = ReadLimit(ours.engine, ours.arena)
    times: dict[str, list[float]] = {name: [] for name in ["ours", *theirs]}
    gathered = tokens * TOP_K * SLOT_BYTES
    names = [n for n in theirs if n != "batched_mm" or gathered <= MOST_GATHERED]
    shares, turn, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 2:
        time.sleep(PAUSE)
        rate = limit.measure()
        fastest = 0.0
        for _ in range(4 if tokens <= 16 else 2):
            call = calls[turn % len(calls)]
            times["ours"].append(seconds_of(lambda call=call: ours(call)))
            fastest = max(fastest, call.nbytes / times["ours"][-1])
            turn += 1
        shares.append(fastest / rate)
        for name in names:
            call = calls[turn % len(calls)]
            times[name].append(seconds_of(lambda call=call, name=name: theirs[name](call)))
            turn += 1
    best = {name: min(taken) * 1e3 if taken else None for name, taken in times.items()}
    nbytes = statistics.fmean(call.nbytes for call in calls)
    rival = min(best[name] for name in names)
    return {
        "tokens": tokens,
        "experts": round(nbytes / SLOT_BYTES),
        "ours_ms": best["ours"],
        "ours_gb_per_s": nbytes / best["ours"] / 1e6,
        "limit_gb_per_s": limit.best / 1e9,
        "share_of_limit": nbytes / best["ours"] * 1e3 / limit.best,
        "share_of_limit_median_round": statistics.median(shares),
        "ours_gflop_per_s": calls[0].flops / best["ours"] / 1e6,
        **{f"{name}_ms": best[name] for name in theirs},
        "speedup_over_fastest": rival / best["ours"],
        "rounds": len(shares),
        "error_against_eager": error,
    }


COLUMNS = {
    "tokens": ("T", "d"),
    "experts": ("experts", "d"),
    "ours_ms": ("ours ms", ".2f"),
    "ours_gb_per_s": ("GB/s", ".1f"),
    "limit_gb_per_s": ("limit", ".1f"),
    "share_of_limit": ("share", ".2f"),
    "share_of_limit_median_round": ("median", ".2f"),
    "ours_gflop_per_s": ("GFLOP/s", ".0f"),
    **{f"{name}_ms": (f"{name} ms", ".2f") for name in THEIRS},
    "speedup_over_fastest": ("speedup", ".2f"),
    "error_against_eager": ("error", ".4f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 16, 64, 512])
    parser.add_argument("--seconds", type=float, default=8, help="for each row (default: 8)")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each CPU (default)")
    parser.add_argument("--kernels", default="", help="instruction set (default: the best)")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.add_argument(
        "--format", nargs="+", choices=[*FORMATS_TIMED, "all"], default=[],
        help="weights in fewer bits, against bf16, instead of bf16 against transformers",
    )  # fmt: skip
    parser.add_argument(
        "--llama-python", type=Path,
        help="of an environment with llama-cpp-python: with --format, against its kernels too",
    )  # fmt: skip
    options = parser.parse_args()

    torch.manual_seed(0)
    engine = _core.CpuEngine(threads=options.threads, kernels=options.kernels)
    torch.set_num_threads(engine.threads)
    gate_up, down = random_weights()
    ours = Ours(engine, gate_up, down)
    if options.format:
        names = [*FORMATS_TIMED] if "all" in options.format else options.format
        rows = []
        for name in names:
            scaled = Scaled(engine, FORMATS_TIMED[name])
            for tokens in options.tokens:
                llama = None
                if options.llama_python:
                    llama = Llama(options.llama_python, name, tokens, engine.threads)
                rows.append(measure_format(name, tokens, options.seconds, scaled, ours, llama))
                if llama is not None:
                    llama.close()
        print(f"Qwen3-30B-A3B geometry, {engine.threads} threads, {engine.kernels}; best times")
        print_table(rows, FORMAT_COLUMNS | (LLAMA_COLUMNS if options.llama_python else {}))
        if options.json:
            write_json(options.json, "ffn_cpu_formats", kernels=engine.kernels, rows=rows)
        return
    theirs = {name: transformers_experts(name, gate_up, down) for name in THEIRS}
    print(
        f"Qwen3-30B-A3B geometry, bf16, {engine.threads} threads, {engine.kernels}; "
        "best times; share: of the read limit"
    )
    with torch.no_grad():
        rows = [measure(tokens, options.seconds, ours, theirs) for tokens in options.tokens]
    print_table(rows, COLUMNS)
    if options.json:
        write_json(
            options.json,
            "ffn_cpu",
            geometry={
                "hidden": HIDDEN,
                "intermediate": INTERMEDIATE,
                "experts": EXPERTS,
                "top_k": TOP_K,
                "dtype": "bf16",
            },
            threads=engine.threads,
            kernels=engine.kernels,
            rows=rows,
        )


if __name__ == "__main__":
    main()

"""The expert FFN on a GPU, against its measured memory bandwidth and matrix product rate.

    python -m benchmarks.ffn_gpu --json benchmarks/results/ffn_gpu.json
    python -m benchmarks.ffn_gpu --compile        # only fills Triton's cache
    python -m benchmarks.ffn_gpu --dry-run        # tiny, on the CPU under TRITON_INTERPRET=1

Bytes that must move: every distinct expert of a call once, plus hidden and output. FLOPs: 6 * T * k
* H * I (4 for plain experts). Consecutive calls use different experts. The bytes that a call reads
have left the L2 cache before, because enough other calls ran since their last use. Ours,
transformers' grouped_mm, batched_mm and eager, a torch loop, and vLLM's fused experts (if
installed) use the same weights. Each is first compared with a float32 loop; a wrong one gets no
time. Times are medians over calls, launched from Python and replayed from a CUDA graph. Without a
GPU the JSON says so, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import roofline_gpu
from benchmarks.common import print_table, write_json
from moeinf.kernels import ExpertForm, ExpertMatrices, Gate, fused_experts

TOKENS = (1, 2, 4, 8, 16, 512, 4096)
TOLERANCE = 2e-2  # of a result in bf16 against float32, by norm
MOST_GATHERED = 8 << 30  # batched_mm copies the experts of every route
MOST_LOOPED = 64  # tokens for which a loop over routes is worth waiting for
# What a profile lists beside the kernels of a device, depending on torch's version.
PROFILER_S_OWN = ("Activity Buffer", "Command Buffer", "Context Sync", "Event Sync", "Stream Sync")


@dataclass(frozen=True)
class Geometry:
    """The MoE layer of a published model, as in its configuration file."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    clamped: bool = False  # GPT-OSS: clamped SwiGLU, interleaved, biases, transposed weights

    def expert_bytes(self, itemsize: int = 2) -> int:
        bias = 2 * self.intermediate + self.hidden if self.clamped else 0
        return (3 * self.hidden * self.intermediate + bias) * itemsize

    def bytes(self, distinct: int, tokens: int, itemsize: int = 2) -> int:
        """What a call must move: distinct experts, the tokens and the result, once each."""
        return distinct * self.expert_bytes(itemsize) + 2 * tokens * self.hidden * itemsize

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.top_k * self.hidden * self.intermediate


# Those that the marks name come first.
GEOMETRIES = (
    Geometry("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Geometry("Mixtral-8x7B", 4096, 14336, 8, 2),
    Geometry("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Geometry("DeepSeek-V3", 7168, 2048, 256, 8),
    Geometry("Qwen3-Next-80B-A3B", 2048, 512, 512, 10),
    Geometry("OLMoE", 2048, 1024, 64, 8),
    Geometry("GPT-OSS-20B", 2880, 2880, 32, 4, clamped=True),
    Geometry("GLM-4.5-Air", 4096, 1408, 128, 8),
)
TINY = (
    Geometry("tiny", 64, 32, 6, 2),
    Geometry("tiny GPT-OSS", 48, 32, 4, 2, clamped=True),
)


class Layer:
    """Random bf16 weights of all experts of one layer, for our kernels and for transformers.

    Those of GPT-OSS lie by rows, interleaved, as in its files.
    """

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self.geometry, self.device, self.dtype = geometry, device, dtype
        E, H, I = geometry.experts, geometry.hidden, geometry.intermediate  # noqa: E741

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype).mul_(scale)

        self.gate_up = normal(E, 2 * I, H, scale=H**-0.5)
        self.down = normal(E, H, I, scale=I**-0.5)
        self.biases: dict[str, torch.Tensor] = {}
        self.form = ExpertForm()
        if geometry.clamped:
            self.biases = {
                "gate_up_bias": normal(E, 2 * I, scale=0.1), "down_bias": normal(E, H, scale=0.1),
            }  # fmt: skip
            self.form = ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True)
        self.matrices = ExpertMatrices.of_fused(
            self.gate_up, self.down, interleaved=geometry.clamped, **self.biases
        )

    def module(self) -> SimpleNamespace:
        """What transformers' experts functions read from `self`."""
        clamped = self.geometry.clamped
        return SimpleNamespace(
            num_experts=self.geometry.experts, gate_up_proj=self.gate_up, down_proj=self.down,
            gate_up_proj_bias=self.biases.get("gate_up_bias"),
            down_proj_bias=self.biases.get("down_bias"), has_bias=clamped, has_gate=True,
            is_transposed=False, is_concatenated=not clamped, has_post_expert_norm=False,
            _is_expert_parallel=False, act_fn=torch.nn.functional.silu,
            _apply_gate=lambda rows: gate(rows, clamped),
        )  # fmt: skip


def gate(rows: torch.Tensor, clamped: bool) -> torch.Tensor:
    if not clamped:
        first, second = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(first) * second
    first, second = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return (second + 1) * first * torch.sigmoid(first * 1.702)


@dataclass(frozen=True)
class Call:
    """One call's inputs: hidden [T, H], ids [T, k] int64, weights [T, k]; its distinct experts."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    distinct: int


def calls(layer: Layer, tokens: int, count: int, seed: int = 0) -> list[Call]:
    """`count` calls; those of one token go round the experts, others draw theirs at random."""
    make = torch.Generator().manual_seed(seed)
    geometry, made = layer.geometry, []
    around = torch.randperm(geometry.experts, generator=make)
    for n in range(count):
        if tokens == 1:
            places = (torch.arange(geometry.top_k) + n * geometry.top_k) % geometry.experts
            ids = around[places][None]
        else:
            noise = torch.rand(tokens, geometry.experts, generator=make)
            ids = noise.topk(geometry.top_k, dim=1).indices
        hidden = torch.randn(tokens, geometry.hidden, generator=make)
        weights = torch.rand(tokens, geometry.top_k, generator=make).softmax(-1)
        made.append(
            Call(
                hidden.to(layer.device, layer.dtype),
                ids.to(layer.device),
                weights.to(layer.device, layer.dtype),
                int(ids.unique().numel()),
            )
        )
    return made


def loop_over_experts(layer: Layer, call: Call) -> torch.Tensor:
    """The torch loop that models ship with: one pair of products per expert that is hit."""
    module, out = layer.module(), torch.zeros_like(call.hidden)
    for e in call.ids.unique().tolist():
        token, place = (call.ids == e).nonzero(as_tuple=True)
        up, down = module.gate_up_proj[e].t(), module.down_proj[e].t()
        rows = call.hidden[token] @ up
        rows = module._apply_gate(rows + module.gate_up_proj_bias[e] if module.has_bias else rows)
        y = rows @ down
        y = y + module.down_proj_bias[e] if module.has_bias else y
        out.index_add_(0, token, y * call.weights[token, place, None])
    return out


def expected(layer: Layer, call: Call, tokens: int) -> torch.Tensor:
    """Float32, route by route, for the first `tokens` tokens."""
    module = layer.module()
    out = torch.zeros(tokens, layer.geometry.hidden, device=layer.device)
    for t in range(tokens):
        for j, e in enumerate(call.ids[t].tolist()):
            up, down = module.gate_up_proj[e].float().t(), module.down_proj[e].float().t()
            rows = call.hidden[t].float() @ up
            rows = rows + module.gate_up_proj_bias[e].float() if module.has_bias else rows
            y = module._apply_gate(rows) @ down
            y = y + module.down_proj_bias[e].float() if module.has_bias else y
            out[t] += call.weights[t, j].float() * y
    return out


Run = Callable[[Call], torch.Tensor]


def implementations(layer: Layer, tokens: int) -> Iterator[tuple[str, Run]]:
    """Name and function of all that can run here, ours first."""
    geometry = layer.geometry
    yield (
        "ours",
        lambda call: fused_experts(
            call.hidden,
            call.ids,
            call.weights,
            layer.matrices,
            layer.form,
            num_experts=geometry.experts,
            check_ids=False,
        ),
    )
    try:
        from transformers.integrations import moe
    except ImportError:
        moe = None
    if moe is not None:
        module = layer.module()
        yield (
            "grouped_mm",
            lambda call: moe.grouped_mm_experts_forward(
                module, call.hidden, call.ids, call.weights
            ),
        )
        gathered = tokens * geometry.top_k * geometry.expert_bytes()
        if gathered <= MOST_GATHERED:
            yield (
                "batched_mm",
                lambda call: moe.batched_mm_experts_forward(
                    module, call.hidden, call.ids, call.weights
                ),
            )
    yield "torch loop", lambda call: loop_over_experts(layer, call)
    if not geometry.clamped and layer.device.type == "cuda":
        try:
            from vllm.model_executor.layers.fused_moe import fused_experts as vllm_fused_experts
        except ImportError:
            return
        yield (
            "vllm",
            lambda call: vllm_fused_experts(
                call.hidden, layer.gate_up, layer.down, call.weights.float(), call.ids.int()
            ),
        )


def relative_error(layer: Layer, run: Run, call: Call) -> float:
    tokens = min(4, call.hidden.shape[0])
    want = expected(layer, call, tokens)
    return float((run(call)[:tokens].float() - want).norm() / want.norm())


def launched_microseconds(run: Run, inputs: list[Call], device: torch.device) -> float:
    """Median over calls launched one by one from Python."""
    for call in inputs[:3]:
        run(call)
    times = []
    for call in inputs:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(call)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            run(call)
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def waits_for_device(run: Run, call: Call) -> bool:
    """Does it make the host wait? That has to be known before a capture, not found out by one:
    after a capture that failed, torch still believes to be in it, and its next randn raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def graph_microseconds(run: Run, inputs: list[Call], replays: int = 10) -> float | None:
    """Time of a call in a CUDA graph of all calls, one after the other; None if not capturable."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            if any(waits_for_device(run, call) for call in inputs[:3]):
                return None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in inputs:
                run(call)
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        torch.cuda.synchronize()
        return None
    return roofline_gpu.milliseconds(graph.replay, replays) * 1e3 / len(inputs)


def launches(run: Run, call: Call) -> int | None:
    """Kernels that one call puts on the GPU, by the profiler; None where it sees none."""
    run(call)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(call)
        torch.cuda.synchronize()
    return count_launches((event.name, event.device_type) for event in profile.events()) or None


def count_launches(events: Iterable[tuple[str, Any]]) -> int:
    """Of a profile's events, by name and device, those that are kernels, copies and fills."""
    return sum(
        device == torch.autograd.DeviceType.CUDA and not name.startswith(PROFILER_S_OWN)
        for name, device in events
    )


def measure(
    layer: Layer, tokens: int, count: int, bandwidth: float | None, rate: float | None
) -> list[dict[str, Any]]:
    """One row per implementation; `bandwidth` (bytes/s) and `rate` (FLOP/s) are the limits."""
    geometry, rows = layer.geometry, []
    inputs = calls(layer, tokens, count)
    moved = statistics.median(geometry.bytes(call.distinct, tokens) for call in inputs)
    for name, run in implementations(layer, tokens):
        row: dict[str, Any] = {
            "model": geometry.name, "tokens": tokens, "implementation": name,
            "megabytes": moved / 1e6,
        }  # fmt: skip
        rows.append(row)
        try:
            row["error"] = relative_error(layer, run, inputs[0])
            if not row["error"] <= TOLERANCE:
                row["failed"] = "wrong result"
                continue
            slow = name == "torch loop" and tokens > MOST_LOOPED
            some = inputs[:3] if slow else inputs
            row["us_launched"] = launched_microseconds(run, some, layer.device)
            if layer.device.type == "cuda":
                # A profile takes longer than what it looks at: of others one says enough.
                if name == "ours" or tokens == 1:
                    row["launches"] = launches(run, inputs[0])
                # The torch loop waits for the device, which a graph cannot hold.
                row["us_graph"] = None if name == "torch loop" else graph_microseconds(run, inputs)
        except Exception as problem:  # what a compiler or a launch may raise has no common type
            row["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            continue
        best = min(row["us_launched"], row.get("us_graph") or math.inf)
        row["gb_per_s"] = moved / best / 1e3
        row["tflop_per_s"] = geometry.flops(tokens) / best / 1e6
        if bandwidth is not None and rate is not None:
            row["share_of_bandwidth"] = row["gb_per_s"] * 1e9 / bandwidth
            row["share_of_matmul"] = row["tflop_per_s"] * 1e12 / rate
    return rows


def compile_ours(layer: Layer, tokens: Iterable[int]) -> None:
    """Calls ours once with each number of tokens, which leaves its kernels in Triton's cache."""
    for count in tokens:
        _, run = next(implementations(layer, count))
        run(calls(layer, count, 1)[0])


COLUMNS = {
    "model": ("model", ""),
    "tokens": ("T", "d"),
    "implementation": ("implementation", ""),
    "megabytes": ("MB", ".1f"),
    "us_launched": ("us", ".1f"),
    "us_graph": ("us in graph", ".1f"),
    "gb_per_s": ("GB/s", ".0f"),
    "share_of_bandwidth": ("of bandwidth", ".2f"),
    "tflop_per_s": ("TFLOP/s", ".1f"),
    "share_of_matmul": ("of matmul", ".2f"),
    "launches": ("launches", "d"),
    "error": ("error", ".1e"),
    "failed": ("", ""),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--models", nargs="*", help="names of geometries; all by default")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--calls", type=int, default=32, help="different calls per measurement")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--compile", action="store_true", help="compile our kernels, time nothing")
    options = parser.parse_args(arguments)
    known = TINY if options.dry_run else GEOMETRIES
    names = options.models or [geometry.name for geometry in known]
    unknown = set(names) - {geometry.name for geometry in known}
    if unknown:
        parser.error(f"unknown models {sorted(unknown)}; known: {[g.name for g in known]}")

    bandwidth = rate = None
    if options.dry_run:
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        print("skipped: no CUDA device")
        if options.json:
            write_json(options.json, "ffn_gpu", skipped="no CUDA device")
        return 0
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        if not options.compile:
            bandwidth = roofline_gpu.memory_bandwidth(device)
            rate = roofline_gpu.matmul_rate(device)
            print(f"limits: {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.0f} TFLOP/s in bf16")
    rows: list[dict[str, Any]] = []
    limits = {"bytes_per_s": bandwidth, "flop_per_s": rate}
    for geometry in known:
        if geometry.name in names:
            before = len(rows)
            layer = Layer(geometry, device, torch.bfloat16)
            if options.compile:
                compile_ours(layer, options.tokens)
                del layer
                continue
            for tokens in options.tokens:
                # Many tokens touch all experts: there is nothing to rotate.
                count = options.calls if tokens <= 16 else min(options.calls, 4)
                rows += measure(layer, tokens, count, bandwidth, rate)
            del layer
            if device.type == "cuda":
                torch.cuda.empty_cache()
            # Each at once, for sessions end when their time is up.
            print_table(rows[before:], COLUMNS)
            if options.json:
                write_json(
                    options.json, "ffn_gpu", limits=limits, dry_run=options.dry_run, rows=rows
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())

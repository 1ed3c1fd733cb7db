"""The limits of this GPU: bytes per second from its memory, FLOP per second in bf16.

    python -m benchmarks.roofline_gpu

Memory: the best of a plain read (sum of a large tensor) and a copy (counted twice), over 2 GiB or
an eighth of the memory. Matrix products: torch.matmul of square bf16 matrices, the best of a few
sizes. Other benchmarks measure these limits in their own run and print ratios against them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the current stream, by events; the first calls are not counted."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second."""
    total = torch.cuda.get_device_properties(device).total_memory
    nbytes = min(2 << 30, total // 8)
    source = torch.zeros(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    read = nbytes / milliseconds(lambda: torch.sum(source)) * 1e3
    copied = 2 * nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    return max(read, copied)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP per second of the best large square product."""
    best = 0.0
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        time = milliseconds(lambda a=a, b=b: a @ b, repeats=10)  # type: ignore[misc]
        best = max(best, 2 * n**3 / time * 1e3)
    return best


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
    else:
        here = torch.device("cuda", torch.cuda.current_device())
        print(torch.cuda.get_device_name(here))
        print(f"{memory_bandwidth(here) / 1e9:.0f} GB/s, {matmul_rate(here) / 1e12:.0f} TFLOP/s")

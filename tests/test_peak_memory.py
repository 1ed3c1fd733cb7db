"""The experts are never built in full: a child process stays within what it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from transformers import GptOssConfig, GptOssForCausalLM

from moeinf.checkpoint.store import ExpertStore

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

# Decodes a matrix of zeros, then a large one.
DECODE = """
import sys
from pathlib import Path
from moeinf.checkpoint.folder import read_tensor
from moeinf.checkpoint.formats import FORMATS, VALUES
from moeinf.checkpoint.headers import FileState, TensorEntry
from moeinf.checkpoint.packed_entry import make_entry

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

file, row = Path(sys.argv[1]), FORMATS["q6_k"]

def entry(rows):
    nbytes = rows * 8 * row.unit
    with file.open("ab") as opened:
        opened.truncate(nbytes)
    state = FileState.of(file, file.stat())
    values = TensorEntry("weight", state, "U8", (rows, 8 * row.unit), 0, nbytes)
    return make_entry("weight", row, (rows, 2048), {VALUES: values})

read_tensor(entry(256))
large = entry(20_000)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
found = read_tensor(large)
assert found.count_nonzero() == 0 and found.shape == (20_000, 2048)
print((resident("VmHWM") - before) / (found.nbytes + large.nbytes))
"""


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads the peak from /proc/self/status"
)


def assert_within_budget(tiny: Path, large: Path, budget: int) -> None:
    """The peak is the dense weights and the budget, and a tenth more."""
    store = ExpertStore.open(large)
    dense = sum(entry.nbytes for entry in store.checkpoint.tensors.values()) - store.nbytes
    assert store.nbytes > 3 * (dense + budget) // 2, "the experts must not fit by accident"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny), str(large), str(budget)],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["stats"]["evictions"] > 0
    limit = 1.1 * (dense + budget)
    assert report["peak"] < limit, f"{report['peak'] / 2**20:.0f} MiB, {limit / 2**20:.0f} allowed"


def test_experts_of_a_tensor_each(qwen3_folder: Path, tmp_path: Path) -> None:
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
    assert_within_budget(qwen3_folder, tmp_path, 96 << 20)


def test_fused_transposed_experts_are_never_held_whole(tmp_path: Path) -> None:
    """One tensor has the experts of a layer, [experts, in, out]; each is turned when read."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    for name, experts, hidden in (("tiny", 4, 64), ("large", 96, 1024)):
        config = GptOssConfig(
            vocab_size=40_000,
            hidden_size=hidden,
            intermediate_size=hidden,
            num_hidden_layers=1,
            num_local_experts=experts,
            **sizes,
        )
        model = GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    assert_within_budget(tmp_path / "tiny", tmp_path / "large", 160 << 20)


def test_a_packed_matrix_is_decoded_some_rows_at_a_time(tmp_path: Path) -> None:
    """The largest matrix of a model is its embedding: a second copy of it may be too much."""
    child = subprocess.run(
        [sys.executable, "-c", DECODE, str(tmp_path / "matrix")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(child.stdout) < 1.3

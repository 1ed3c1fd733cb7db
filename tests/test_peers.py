"""The benchmark against other programs gives them the same weights, and runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

import moeinf

pytest.importorskip("gguf")
from benchmarks.gguf_export import export

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_file_holds_the_same_weights(tied: bool, tmp_path: Path, seed: int) -> None:
    folder = write_checkpoint(
        tmp_path / "model",
        seed=seed,
        dtype=torch.bfloat16,
        tie_word_embeddings=tied,
        num_hidden_layers=2,
        norm_topk_prob=True,
    )
    file = tmp_path / "model.gguf"
    export(folder, file)
    ids = torch.arange(20)[None]
    logits = [moeinf.load(path, dtype="bfloat16")(ids).logits for path in (folder, file)]
    assert torch.equal(*logits)


def test_a_small_run_writes_a_row_for_each_system(tmp_path: Path) -> None:
    result = tmp_path / "peers.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--small", "--only", "moeinf",
         "--dir", tmp_path, "--json", result],
        check=True, cwd=ROOT,
    )  # fmt: skip
    rows = json.loads(result.read_text())["rows"]
    assert [row["share"] for row in rows] == [100, 25, 25]
    assert len({row["likeliest"] for row in rows}) == 1, "a token, and its bits, stay"
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["prefill_seconds"] > 0 and row["peak_gb"] > 0

"""The GPU benchmark's logic, on tiny layers: every implementation agrees, every cell fills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layers import DEVICE, TOLERANCE

from benchmarks import ffn_gpu


@pytest.mark.skipif(DEVICE == "cuda", reason="a dry run is for machines without a GPU")
def test_dry_run_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ffn.json"
    arguments = ["--dry-run", "--tokens", "1", "3", "18", "--calls", "2", "--json", str(path)]
    assert ffn_gpu.main(arguments) == 0
    result = json.loads(path.read_text())
    assert {"commit", "date", "versions", "hardware", "limits", "rows"} <= result.keys()
    for row in result["rows"]:
        assert "failed" not in row, row
        assert row["us_launched"] > 0 and row["gb_per_s"] > 0 and row["error"] <= ffn_gpu.TOLERANCE
    models = {(row["model"], row["tokens"]) for row in result["rows"]}
    ours = [row for row in result["rows"] if row["implementation"] == "ours"]
    assert len(models) == len(ours) == 6
    assert all(row["error"] <= TOLERANCE[torch.bfloat16] for row in ours)
    assert "tiny GPT-OSS" in capsys.readouterr().out

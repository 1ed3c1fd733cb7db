"""The GPU benchmark's own logic, on tiny layers: every implementation agrees and every cell fills.

And the reference that ships beside the kernels, against this folder's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layers import DEVICE, TOLERANCE, Layer, error, resident, slot_ids

from benchmarks import ffn_gpu
from moeinf.kernels.reference import experts_reference


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


@pytest.mark.parametrize(
    "form",
    [
        {"activation": "gelu"},
        {"activation": "gelu_tanh", "transposed": True},
        {"activation": "relu2", "gated": False},
        {"activation": "relu", "bias": True},
        {"activation": "swiglu_clamped", "interleaved": True, "bias": True, "scale": 5.0},
    ],
    ids=str,
)
def test_the_reference_beside_the_kernels(form: dict[str, object]) -> None:
    layer = Layer(3, 2, 4, 24, 10, **form)
    layer.ids[0, 1] = -1
    slots, where = resident(layer)
    weights, biases = slots.arguments()
    found = experts_reference(
        layer.hidden.to(DEVICE), slot_ids(layer.ids, where), layer.weights.to(DEVICE),
        *weights, **biases, **layer.options(),
    )  # fmt: skip
    assert error(found, layer.expected()) < 1e-5
    mapped = experts_reference(
        layer.hidden.to(DEVICE), layer.ids.to(DEVICE), layer.weights.to(DEVICE),
        *weights, **biases, **layer.options(), expert_map=where,
    )  # fmt: skip
    assert torch.equal(mapped, found)

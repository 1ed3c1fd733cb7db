"""The table at the end of a GPU session: marks reached, missed, and what was never measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_summary


def ffn(model: str, tokens: int, implementation: str, **values: Any) -> dict[str, Any]:
    return {"model": model, "tokens": tokens, "implementation": implementation,
            "megabytes": 75.0, **values}  # fmt: skip


def by_name(table: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {row["what"]: (row["measured"], row["reached"]) for row in table if "measured" in row}


def test_marks_are_held_against_the_worst_that_was_measured(tmp_path: Path) -> None:
    rows = [
        ffn("a", 1, "ours", share_of_bandwidth=0.8, us_launched=30.0, us_graph=20.0, launches=2,
            error=3e-3),
        ffn("a", 1, "grouped_mm", us_launched=50.0, us_graph=None, launches=9, error=4e-3),
        ffn("a", 1, "vllm", us_launched=10.0),
        ffn("b", 1, "ours", share_of_bandwidth=0.7, us_launched=40.0, launches=3, error=2e-3),
        ffn("b", 1, "batched_mm", us_launched=30.0),
        ffn("b", 4096, "ours", failed="wrong result"),
    ]  # fmt: skip
    (tmp_path / "ffn_gpu-x.json").write_text(json.dumps({"rows": rows}))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "tests-vector.txt").write_text("....\n38 passed in 3.0s\n")
    (logs / "tests-shared.txt").write_text("F...\n1 failed, 37 passed in 3.0s\n")
    (logs / "tests-forms.txt").write_text("....")
    table = gpu_summary.summary(tmp_path, "x")
    found = by_name(table)
    assert found["tests: vector"] == ("38 passed in 3.0s", "yes")
    assert found["tests: shared"][1] == found["tests: forms"][1] == "NO"
    assert found["tests: forms"][0] == "did not end"
    assert found["one token, 50 MB and more: of bandwidth, least"] == ("0.7", "NO")
    assert found["fastest of transformers / ours, least"] == ("0.75", "NO")
    assert found["launches at decode, most"] == ("3", "NO")
    assert found["relative error in bf16, most"] == ("0.003", "yes")
    assert found["4096 tokens: of the matmul rate, least"] == ("not measured", "")
    assert found["decode step: time over its roofline, most"] == ("not measured", "")
    assert any(row["what"] == "failed: b T=4096" for row in table)


def test_copies_and_decode_steps(tmp_path: Path) -> None:
    copies = [{"megabytes": 9.44, "of_peak": 0.97, "host_us": 22.0},
              {"megabytes": 0.2, "of_peak": 0.3, "host_us": 31.0}]  # fmt: skip
    steps = [{"share": 100, "over_roofline": None}, {"share": 10, "over_roofline": 1.1}]
    (tmp_path / "copy_gpu-x.json").write_text(json.dumps({"rows": copies}))
    (tmp_path / "decode_gpu-x.json").write_text(json.dumps({"rows": steps}))
    found = by_name(gpu_summary.summary(tmp_path, "x"))
    assert found["9 MB experts to the GPU: of the pinned peak"] == ("0.97", "yes")
    assert found["host us per resident step, most"] == ("31", "NO")
    assert found["decode step: time over its roofline, most"] == ("1.1", "yes")


def test_packed_formats_are_held_against_bf16(tmp_path: Path) -> None:
    rows = [
        {"format": "bf16", "tokens": 1, "us": 10.0, "times_bf16": 1.0},
        {"format": "fp8", "tokens": 1, "us": 8.0, "times_bf16": 1.25},
        {"format": "mxfp4", "tokens": 1, "us": 5.0, "times_bf16": 2.0},
        {"format": "fp8", "tokens": 512, "failed": "wrong result"},
    ]
    (tmp_path / "formats_gpu-x.json").write_text(json.dumps({"rows": rows}))
    table = gpu_summary.summary(tmp_path, "x")
    found = by_name(table)
    assert found["packed formats, 1 tokens: bf16's time over theirs, least"] == ("1.25", "yes")
    assert any(row["what"] == "failed: fp8 T=512" for row in table)

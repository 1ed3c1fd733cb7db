"""The tuning table and the tool that extends it; nothing here needs a GPU or the interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import ffn_gpu, formats_gpu, tune
from moeinf.kernels import tuning

ASKED = {
    "dtype": "bfloat16",
    "hidden": 2048,
    "intermediate": 768,
    "order": "rows",
    "weights": "plain",
}


def lookup(kernel: str, *devices: str, **asked: object) -> dict[str, int]:
    tuning.config.cache_clear()
    return tuning.config(kernel, devices, **(ASKED | asked))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the committed table that a test may change."""
    path = tmp_path / "tuning.json"
    path.write_text(tuning.TABLE.read_text())
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning.rows.cache_clear()
    yield path
    tuning.rows.cache_clear()
    tuning.config.cache_clear()


def test_the_committed_table_is_as_the_tool_writes_it() -> None:
    text = tuning.TABLE.read_text()
    assert tune.table_text(json.loads(text)["rows"]) == text


def test_a_row_for_this_device_and_geometry_wins(table: Path) -> None:
    asked = ASKED | {"rows_per_tile": 0}
    config = lookup("gate_up_vector", "sm_90", "*") | {"BLOCK_I": 32}
    tune.write_table(
        tune.merged(list(tuning.rows()), [tune.new_row("gate_up_vector", "sm_90", asked, config)])
    )
    assert lookup("gate_up_vector", "sm_90", "*") == config
    assert lookup("gate_up_vector", "sm_80", "*") != config
    assert lookup("gate_up_vector", "sm_90", "*", hidden=4096) != config
    assert lookup("gate_up_vector", "sm_90", "*", order="columns") != config
    named = config | {"BLOCK_I": 64}
    row = tune.new_row("gate_up_vector", "NVIDIA Some GPU", asked, named)
    tune.write_table(tune.merged(list(tuning.rows()), [row]))
    assert lookup("gate_up_vector", "NVIDIA Some GPU", "sm_90", "*") == named
    assert lookup("gate_up_vector", "sm_90", "*") == config


def test_the_same_question_is_answered_once(table: Path) -> None:
    asked = ASKED | {"rows_per_tile": 64}
    rows = list(tuning.rows())
    for block in (32, 128):
        config = {"BLOCK_M": 64, "BLOCK_I": block}
        rows = tune.merged(rows, [tune.new_row("gate_up_grouped", "sm_90", asked, config)])
    assert len(rows) == len(tuning.rows()) + 1
    assert rows[-1]["config"] == {"BLOCK_M": 64, "BLOCK_I": 128}


def test_an_answer_belongs_to_all_who_ask() -> None:
    """A call must not change a shared row for its own number of routes."""
    answer = tuning.config("down_vector", ("*",), dtype="bfloat16", hidden=64, intermediate=32)
    with pytest.raises(TypeError):
        answer["ROUTES"] = 1  # type: ignore[index]


def test_a_kernel_without_rows_is_named(table: Path) -> None:
    table.write_text(json.dumps({"format": tuning.FORMAT, "rows": []}))
    tuning.rows.cache_clear()
    with pytest.raises(LookupError, match="no row for gate_up_vector"):
        lookup("gate_up_vector", "*")
    table.write_text(json.dumps({"format": "other", "rows": []}))
    tuning.rows.cache_clear()
    with pytest.raises(ValueError, match="expected format 'moeinf-tuning-1', found 'other'"):
        lookup("gate_up_vector", "*")


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize(
    "kernel",
    [f"{half}_{path}" for path in ("vector", "shared", "grouped") for half in ("gate_up", "down")],
)
def test_candidates_have_the_parameters_of_the_table(kernel: str, order: str) -> None:
    rows = 64 if kernel.endswith("grouped") else 0
    now = lookup(kernel, "sm_90", "*", order=order, rows_per_tile=rows)
    tried = tune.candidates(kernel, order, rows)
    assert len(tried) > 4
    for config in tried:
        assert config.keys() == now.keys()
        assert config.get("BLOCK_M", rows) == rows


@pytest.mark.parametrize("name,weights", [("bf16", "plain"), ("fp8", "e4m3"), ("q4_k", "q4_k")])
def test_the_tool_asks_what_a_call_asks(name: str, weights: str) -> None:
    row, cpu = formats_gpu.FORMATS_TIMED[name], torch.device("cpu")
    layer = formats_gpu.Packed(row, ffn_gpu.Geometry("tiny", 256, 512, 6, 2), cpu)
    for tokens, path in ((1, "vector"), (2, "shared"), (17, "grouped")):
        asked = tune.questions(layer, ffn_gpu.calls(layer, tokens, 1)[0])
        assert tuple(asked) == tune.kernels_of(path)
        for kernel, question in asked.items():
            assert question["order"] == "rows" and question["hidden"] == 256
            assert question["weights"] == weights
            assert lookup(kernel, "*", **question)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_benchmarks_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ffn.json"
    assert ffn_gpu.main(["--json", str(path)]) == 0
    assert json.loads(path.read_text())["skipped"] == "no CUDA device"
    assert tune.main([]) == 0
    assert capsys.readouterr().out.count("skipped: no CUDA device") == 2


def test_bytes_and_flops_are_those_of_the_models() -> None:
    sizes = {g.name: g.expert_bytes() for g in ffn_gpu.GEOMETRIES}
    assert sizes["Mixtral-8x7B"] == 352_321_536
    assert sizes["Qwen3-30B-A3B"] == 9_437_184
    qwen = next(g for g in ffn_gpu.GEOMETRIES if g.name == "Qwen3-30B-A3B")
    assert qwen.bytes(8, 1) == 8 * 9_437_184 + 2 * 2048 * 2
    assert qwen.flops(4096) == 6 * 4096 * 8 * 2048 * 768


def test_calls_of_one_token_go_round_all_experts() -> None:
    layer = ffn_gpu.Layer(ffn_gpu.TINY[0], torch.device("cpu"), torch.bfloat16)
    made = ffn_gpu.calls(layer, 1, 3)
    assert sorted(int(e) for call in made for e in call.ids.flatten()) == list(range(6))
    assert all(call.distinct == 2 for call in made)
    busy = ffn_gpu.calls(layer, 40, 1)[0]
    assert busy.distinct == 6 and busy.ids.shape == (40, 2)

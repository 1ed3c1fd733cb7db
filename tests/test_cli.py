"""The command line: real processes, as a user would start them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeinf.pocket import POCKET
from moeinf.traces.trace import Trace


def moeinf(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "moeinf.cli", *arguments], capture_output=True, text=True
    )
    assert result.returncode == expect, result.stderr + result.stdout
    return result


def test_run_continues_a_prompt_and_verifies_it() -> None:
    output = moeinf("run", "--memory", "25%", "--max-new-tokens", "8", "--verify", "--json").stdout
    report = json.loads(output)
    assert report["verified"] is True
    assert report["new_tokens"] == len(report["tokens"]) == 8
    assert 0 < report["hit_rate"] < 1
    assert report["slots"] == round(report["total_experts"] / 4)
    assert report["bytes_read_per_token"] > 0


def test_run_streams_text_and_ends_with_a_table() -> None:
    output = moeinf("run", "--prompt", "import os", "--max-new-tokens", "4").stdout
    for row in ("tokens/s", "time to first token", "hit rate", "read per token", "peak memory"):
        assert row in output
    assert "prefetch" not in output


def test_run_tells_of_prefetching() -> None:
    arguments = ("run", "--memory", "15%", "--max-new-tokens", "8", "--prefetch", "gate")
    output = moeinf(*arguments).stdout
    for row in ("prefetch, gate", "recall", "useful", "late prefetches"):
        assert row in output
    report = json.loads(moeinf(*arguments, "--json", "--verify").stdout)
    assert report["verified"] is True
    assert 0 < report["prefetch"]["recall"] <= 1
    assert report["prefetch"]["prefetch_bytes"] >= 0


def test_sampling_is_reproducible() -> None:
    arguments = ("run", "--temperature", "0.9", "--max-new-tokens", "12", "--json", "--seed")
    first, again, other = (
        json.loads(moeinf(*arguments, seed).stdout)["tokens"] for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_run_with_another_checkpoint_and_budget_in_bytes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(POCKET, tmp_path / "copy"))
    output = moeinf("run", str(folder), "--memory", "1MiB", "--max-new-tokens", "2", "--json")
    assert json.loads(output.stdout)["slot_memory_bytes"] <= 2**20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--prompt", ""], "the prompt is empty"),
        (["run", "--prompt", "x = 1\n" * 2000], "exceed the model's context"),
        (["run", "--memory", "1KiB"], "below one slot"),
        (["run", "--memory", "lots"], "not a size"),
        (["run", "--prefetch", "psychic"], "no prefetch is named"),
        (["run", "--policy", "psychic"], "psychic"),
        (["run", "--device", "cuda"], "cuda"),
        (["run", "no/such/folder"], "expected a checkpoint folder"),
        (["run", "--record", "no/such/x"], "no/such/x: cannot be written, for no/such is not"),
        (["trace", "-o", "no/such/x"], "no/such/x: cannot be written, for no/such is not"),
        (["info", "no/such/folder"], "expected a checkpoint folder"),
    ],
)
def test_errors_are_one_line_and_no_traceback(arguments: list[str], message: str) -> None:
    result = moeinf(*arguments, expect=1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_info_describes_the_experts() -> None:
    facts = json.loads(moeinf("info", "--json").stdout)
    config = json.loads((POCKET / "config.json").read_text())
    assert facts["num_experts"] == config["num_experts"]
    assert facts["top_k"] == config["num_experts_per_tok"]
    total = facts["num_layers"] * facts["num_experts"] * facts["expert_bytes"]
    assert facts["all_experts_bytes"] == total
    assert "experts that fit here" in moeinf("info").stdout


def test_doctor_measures_this_machine(tmp_path: Path) -> None:
    facts = json.loads(moeinf("doctor", str(tmp_path), "--json").stdout)
    assert facts["memory_read_bandwidth"] > 1e8
    assert facts["disk"]["bytes_per_second"] > 1e6
    assert facts["cpu_kernels"][facts["cpu_kernel_used"]] is True
    assert not list(tmp_path.iterdir()), "the sample file is removed"


def test_bad_traces_and_budgets_are_one_line_too(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    Trace.from_arrays([[[0, 1]], [[1, 2]]], num_experts=4).save(whole)
    cut.write_bytes(whole.read_bytes()[:-3])
    for arguments, message in (
        (["simulate", str(cut)], "cut.safetensors: not a readable safetensors file"),
        (["report", str(cut)], "cut.safetensors: not a readable safetensors file"),
        (["simulate", str(whole), "--slots", "0"], "slots: expected 1 to"),
        (["simulate", str(whole), "--policy", "lur"], "no policy is named 'lur'"),
        (["simulate", str(whole), "--eamc", str(cut)], "cut.safetensors"),
        (["simulate", str(whole), "--policy", "lru", "--eamc", str(cut)], "for the policy 'eam'"),
    ):
        result = moeinf(*arguments, expect=1)
        assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("after", ["load", "generation"])
def test_ctrl_c_ends_quickly_and_quietly(after: str) -> None:
    """A signal at the first sign of life, or once text is streaming."""
    arguments = ["run", "--memory", "10%", "--max-new-tokens", "400", "--temperature", "1"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "moeinf.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    if after == "generation":
        child.stdout.read(1)
    else:
        time.sleep(3.0)
    try:
        for _ in range(20):  # an import can swallow one: a user presses again
            child.send_signal(signal.SIGINT)
            try:
                _, errors = child.communicate(timeout=1.5)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        child.kill()
    assert child.returncode in (130, -signal.SIGINT), errors.decode()
    assert b"moeinf/cli" not in errors, errors.decode()

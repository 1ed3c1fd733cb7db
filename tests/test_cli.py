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
from typing import Any

import pytest

from moeinf.pocket import POCKET
from moeinf.traces.trace import Trace


def moeinf(
    *arguments: str | bytes, expect: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "moeinf.cli", *arguments],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        **options,
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
        (["run", "--eamc", "no/such/x"], "no/such/x: cannot be written, for no/such is not"),
        (["run", "--record", "tests"], "tests: cannot be written: expected a file, found a folder"),
        (["trace", "-o", ""], "cannot be written: expected a file, found a folder"),
        (["report", "x", "-o", "tests"], "tests: cannot be written: expected a file"),
        (["report", "x", "--png", "README.md"], "--png README.md: expected a folder, found a file"),
        (["simulate", "x", "--plot", "tests"], "tests: cannot be written: expected a file"),
        (["simulate", "tests"], "tests: expected a file, found a folder"),
        (["simulate", "x", "--eamc", "tests"], "tests: expected a file, found a folder"),
        (["simulate", "no\nsuch[/b]"], "no\nsuch[/b]: No such file or directory"),
        (["run", "--prompt", b"\xff"], "--prompt: expected text in UTF-8"),
        (["info", "no/such/folder"], "expected a checkpoint folder"),
    ],
)
def test_errors_are_one_line_and_no_traceback(arguments: list[str], message: str) -> None:
    result = moeinf(*arguments, expect=1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--seed", "9" * 20], ["--seed", "-1"], ["--temperature", "nan"], ["--temperature", "-1"]],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(arguments: list[str]) -> None:
    assert "Invalid value for" in moeinf("run", *arguments, expect=2).stderr


def test_prompts_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"ok\n\xff\n")
    error = moeinf("trace", "--prompts", str(tmp_path / "p"), expect=1).stderr
    assert f"moeinf: {tmp_path / 'p'}: expected text in UTF-8" in error


def test_run_says_that_a_folder_has_no_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(POCKET / name, tmp_path)
    for command in (["run"], ["trace", "-o", str(tmp_path / "t")]):
        result = moeinf(*command[:1], str(tmp_path), *command[1:], expect=1)
        assert f"moeinf: {tmp_path}: expected a tokenizer" in result.stderr


def test_output_has_every_letter_of_every_path_in_every_terminal(tmp_path: Path) -> None:
    """Names that rich takes for markup or that are not UTF-8, no width, and ASCII alone."""
    folder = os.fsencode(tmp_path) + b"/a[/b]\xc3\xa9"
    shutil.copytree(os.fsencode(POCKET), folder)
    env = {**os.environ, "COLUMNS": "0", "PYTHONIOENCODING": "ascii"}
    shown = moeinf("info", folder, env=env).stdout
    assert "experts per layer" in shown and "[/b]" in shown
    assert json.loads(moeinf("info", folder, "--json", env=env).stdout)["num_layers"] > 0
    Path(os.fsdecode(folder + b"\xff")).symlink_to(os.fsdecode(folder))
    refused = moeinf("info", folder + b"\xff", env=env, expect=1)
    assert r"a[/b]\xe9\udcff" in refused.stderr and "expected a path in UTF-8" in refused.stderr


def test_a_reader_that_stops_early_is_no_error_message() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "moeinf.cli", "info", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 1


def test_a_device_that_is_full_is_one_line(tmp_path: Path) -> None:
    trace = tmp_path / "whole.safetensors"
    Trace.from_arrays([[[0, 1]], [[1, 2]]], num_experts=4).save(trace)
    with pytest.raises(OSError, match=r"^/dev/full: cannot be written: No space left"):
        Trace.load(trace).save("/dev/full")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "moeinf.cli", "info", "--json"],
            stdout=full,
            stderr=-1,
            text=True,
        )
    assert result.returncode == 1 and result.stderr.endswith("No space left on device\n")


@pytest.mark.parametrize(
    "arguments",
    [["simulate"], ["report", "-o", "r.html", "--png", "p"]],
    ids=["simulate", "report"],
)
def test_every_command_speaks_json(tmp_path: Path, arguments: list[str]) -> None:
    """run, info, trace and doctor: see the other tests."""
    (tmp_path / "t[").mkdir()
    Trace.from_arrays([[[0, 1]], [[1, 2]]], num_experts=64).save(tmp_path / "t[/b]")
    tree = os.environ.get("PYTHONPATH", str(Path.cwd()))
    result = moeinf(
        *arguments, "t[/b]", "--json", cwd=tmp_path, env={**os.environ, "PYTHONPATH": tree}
    )
    found = json.loads(result.stdout)
    if arguments[0] == "report":
        assert (tmp_path / found["file"]).is_file()
        assert found["pictures"] and all((tmp_path / one).is_file() for one in found["pictures"])
    else:
        assert {one["slots"] for one in found}


def test_doctor_measures_the_rest_where_nothing_can_be_written() -> None:
    facts = json.loads(moeinf("doctor", "/proc", "--json").stdout)
    assert "failed" in facts["disk"] and facts["memory_read_bandwidth"] > 1e8
    assert any("the disk was not measured" in note for note in facts["missing"])


def test_info_describes_the_experts() -> None:
    facts = json.loads(moeinf("info", "--json").stdout)
    config = json.loads((POCKET / "config.json").read_text())
    assert facts["num_experts"] == config["num_experts"]
    assert facts["top_k"] == config["num_experts_per_tok"]
    total = facts["num_layers"] * facts["num_experts"] * facts["expert_bytes"]
    assert facts["all_experts_bytes"] == total
    assert "experts that fit here" in moeinf("info").stdout


def test_doctor_measures_this_machine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    facts = json.loads(moeinf("doctor", str(tmp_path / "disk"), "--json", env=env).stdout)
    assert facts["memory_read_bandwidth"] > 1e8
    assert facts["disk"]["bytes_per_second"] > 1e6
    assert facts["cpu_kernels"][facts["cpu_kernel_used"]] is True
    assert not list((tmp_path / "disk").iterdir()), "the sample file is removed"


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

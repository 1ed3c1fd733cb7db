"""The README's commands and its Python run, with the built-in model in place of a checkpoint."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeinf
import moeinf.cli
from moeinf.pocket import POCKET

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/runtimes.md",
    "tools/pocket/README.md",
]
PAGES += [f"benchmarks/notes/{page.name}" for page in (ROOT / "benchmarks/notes").glob("*.md")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("moeinf ")]


def with_built_in_model(text: str) -> str:
    return re.sub(r"path/to/[\w.-]+|^Qwen/[\w.-]+", str(POCKET), text)


@pytest.mark.timeout(900)  # nine programs, on a machine that may be busy
def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = commands()
    assert {command[1] for command in asked} == {
        "run", "chat", "serve", "info", "doctor", "trace", "simulate", "report", "pack", "plan",
        "top", "tune",
    }  # fmt: skip
    running = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=2)
    for command in asked:
        if command[1] in (
            "serve",
            "tune",
        ):  # a signal ends it; it takes minutes
            continue
        words = [with_built_in_model(word) for word in command[1:]]
        if command[1] == "run":  # the built-in model is smaller than the README's budget
            words[words.index("--memory") + 1] = "25%"
            words[words.index("--max-new-tokens") + 1] = "5"
        if command[1] == "chat":
            words += ["--max-new-tokens", "5"]
        if command[1] == "top":
            words += ["--once"]
        monkeypatch.setattr(sys, "argv", ["moeinf", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
        with pytest.raises(SystemExit) as ended:
            moeinf.cli.main()
        assert not ended.value.code, words
    assert running.name  # for moeinf top to see
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_python_of_the_readme_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {
        "input_ids": torch.randint(2, 3072, (1, 8), generator=generator),
        "hidden": torch.randn(3, 160, generator=generator, dtype=torch.bfloat16),
        "topk_ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [3, 2, 1, 0]]),
        "topk_weights": torch.full((3, 4), 0.25),
    }
    found = blocks("python")
    assert len(found) == 2
    for block in found:
        exec(compile(with_built_in_model(block), "README.md", "exec"), names)
    assert names["model"].moeinf.stats()["hit_rate"] > 0
    assert names["y"].shape == names["hidden"].shape
    assert names["gate_up"].shape == (2, 2 * 64, 160)


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", [page for page in PAGES if "notes/" in page])
def test_every_note_has_its_four_parts_and_its_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for entry in [] if page.endswith("README.md") else text.split("\n## ")[1:]:
        heads = re.findall(r"^- \*\*(\w+)\*\*", entry, flags=re.M)
        assert heads == ["Question", "Predicted", "Measured", "Decision"], entry.splitlines()[0]
    for name in re.findall(r"`(?:benchmarks/results/)?(\w+\.json)`", text):
        assert (ROOT / "benchmarks/results" / name).exists(), name

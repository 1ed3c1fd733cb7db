"""The README's commands run; those on `path/to/...` need a checkpoint and are left out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("moeinf ")]


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    ran = [command for command in commands() if not any("path/to" in word for word in command)]
    assert {command[1] for command in ran} == {"doctor", "trace", "simulate", "report"}
    for command in ran:
        subprocess.run([sys.executable, "-m", "moeinf.cli", *command[1:]], cwd=tmp_path, check=True)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parent.parent / link).exists(), link

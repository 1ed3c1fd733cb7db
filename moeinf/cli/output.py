"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Two columns: a name and its value."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    console().print(table)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a header row."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def human_bytes(count: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def console(*, stderr: bool = False) -> Console:
    """Prints text as it is: a path may hold what rich takes for markup.

    Its width is that of the terminal, also where COLUMNS says 0.
    """
    width = None if os.environ.get("COLUMNS") != "0" else shutil.get_terminal_size().columns
    return Console(stderr=stderr, markup=False, width=width)


def utf8(name: str, text: str) -> str:
    """The text of an option. Raises ValueError if it came in another encoding than UTF-8."""
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError(f"{name}: expected text in UTF-8, found {text!a}")
    return text

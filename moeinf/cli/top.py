"""`moeinf top`: hits, reads and stalls of running processes, by layer, while they run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moeinf.cache import live
from moeinf.cache.statistics import COUNTERS
from moeinf.cli import options
from moeinf.cli.output import console, human_bytes, print_json

Report = dict[str, Any]
NONE = "no process of yours with a cache is running here: start one, or name its id"


def command(
    pids: Annotated[
        list[int] | None,
        typer.Argument(help="Processes, by their ids; all of yours without it.", metavar="PID..."),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once: counts since each process started.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Shows caches of running processes: runs, servers, vLLM, SGLang, programs of yours.

    Rates are those since the look before. With --json one look is printed, as counts.
    """
    found = look(pids)
    if json:
        print_json(list(found.values()))
        return
    if not found:
        raise ValueError(NONE)
    shown = console()
    if once:
        shown.print(picture(found, {}))
        return
    with Live(picture(found, {}), console=shown, auto_refresh=False, screen=True) as screen:
        while found:
            time.sleep(interval)
            before, found = found, look(list(found) if pids else None)
            screen.update(picture(found, before), refresh=True)


def look(pids: list[int] | None) -> dict[int, Report]:
    """What each process says, by its id. OSError for one that was named and does not answer."""
    found = {}
    for pid in live.running() if pids is None else pids:
        try:
            report = live.ask(pid)
        except OSError as error:  # it has ended since, or is stopped
            if pids is None:
                continue
            raise OSError(f"process {pid} does not answer: {error}") from error
        if report["caches"] or pids:
            found[pid] = report
    return found


def picture(found: dict[int, Report], before: dict[int, Report]) -> Group:
    """The tables of one look, with rates since the look `before` where it had the same cache."""
    parts: list[Any] = []
    for pid, report in found.items():
        earlier = before.get(pid)
        command = [Path(part).name for part in report["command"][:1]]
        parts.append(Text(" ".join([f"{pid}", *command, *report["command"][1:]])[:200]))
        for cache in report["caches"]:
            olds = earlier["caches"] if earlier else []
            old = next((one for one in olds if one["name"] == cache["name"]), None)
            seconds = report["seconds"] - earlier["seconds"] if earlier and old else None
            parts.append(table_of(cache, old, seconds))
    return Group(*parts)


def table_of(cache: Report, old: Report | None, seconds: float | None) -> Table:
    """A row for all layers and one for each. `old` are its counters `seconds` ago."""
    table = Table(
        title=f"{cache['checkpoint']}  {cache['slots']} of {cache['experts']} experts in "
        f"{human_bytes(cache['nbytes'])} on {cache['device']}, policy {cache['policy']}",
        title_justify="left",
    )
    per = "/s" if seconds else ""
    for name in ("layer", f"experts{per}", "hits", f"read{per}", f"ahead{per}", "waited"):
        table.add_column(name, justify="right")
    rows = [("all", cache, old)]
    olds = old["layers"] if old else [None] * len(cache["layers"])
    rows += [(str(i), *two) for i, two in enumerate(zip(cache["layers"], olds, strict=True))]
    for name, new, earlier in rows:
        table.add_row(name, *cells(new, earlier, seconds))
    return table


def cells(new: Report, old: Report | None, seconds: float | None) -> list[str]:
    """One row. Counters that were set to zero in between count from there."""
    change = {name: new[name] - (old[name] if old and old[name] <= new[name] else 0)
              for name in COUNTERS}  # fmt: skip
    over = seconds or 1.0
    waited = f"{change['stall_seconds']:.2f} s"
    if seconds:
        waited = f"{min(change['stall_seconds'] / seconds, 1):.0%}"
    return [
        f"{change['accesses'] / over:.0f}",
        f"{change['hits'] / change['accesses']:.1%}" if change["accesses"] else "-",
        human_bytes(change["demand_bytes"] / over),
        human_bytes(change["prefetch_bytes"] / over),
        waited,
    ]

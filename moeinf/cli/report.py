"""`moeinf report`: pictures of traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moeinf.cli.output import check_writable
from moeinf.traces.trace import Trace


def command(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file.")] = Path(
        "report.html"
    ),
    png: Annotated[
        Path | None, typer.Option(help="Also write every picture as PNG into this folder.")
    ] = None,
) -> None:
    """Writes one self-contained page: hit rates by policy and budget, pictures of routing."""
    from moeinf.report import write_pngs, write_report
    from moeinf.report.analysis import analyse
    from moeinf.report.figures import PICTURES  # fails at once if matplotlib is missing

    check_writable(output)
    console = Console(stderr=True)
    with console.status("reading") as status:
        analyses = [
            analyse(Trace.load(path), progress=lambda done: status.update(done)) for path in traces
        ]
        status.update(f"drawing {len(PICTURES)} pictures of each")
        write_report(output, analyses)
        if png is not None:
            write_pngs(png, analyses)
    console.print(f"wrote {output}" + (f" and pictures into {png}" if png else ""))

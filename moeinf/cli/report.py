"""`moeinf report`: pictures of traces."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from moeinf.cli import options
from moeinf.cli.output import console, print_json
from moeinf.output_files import check_writable
from moeinf.traces.trace import Trace


def command(
    traces: options.Traces,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file.")] = Path(
        "report.html"
    ),
    png: Annotated[
        Path | None, typer.Option(help="Also write every picture as PNG into this folder.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Writes one self-contained page: hit rates by policy and budget, pictures of routing."""
    from moeinf.report import write_pngs, write_report
    from moeinf.report.analysis import analyse
    from moeinf.report.figures import PICTURES  # fails at once if matplotlib is missing

    check_writable(output)
    if png is not None and png.exists() and not png.is_dir():
        raise NotADirectoryError(f"--png {png}: expected a folder, found a file")
    pictures: list[Path] = []
    with console(stderr=True).status("reading") as status:
        analyses = [
            analyse(Trace.load(path), progress=lambda done: status.update(escape(done)))
            for path in traces
        ]
        status.update(f"drawing {len(PICTURES)} pictures of each")
        write_report(output, analyses)
        if png is not None:
            pictures = write_pngs(png, analyses)
    if json:
        print_json({"file": str(output), "pictures": [str(path) for path in pictures]})
    else:
        print(f"wrote {output}" + (f" and pictures into {png}" if png else ""), file=sys.stderr)

"""`moeinf pack`: writes a checkpoint again, experts one after another, in fewer bits if asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import console, human_bytes, print_facts, print_json
from moeinf.packing.palettes import BF16_PALETTE
from moeinf.packing.targets import DENSE, TARGETS


def command(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder, or a name on the Hub.")],
    dest: Annotated[Path, typer.Argument(help="A new folder. Give the same one to go on.")],
    format: Annotated[
        str | None,
        typer.Option(
            help=f"Of the experts: {', '.join((*TARGETS, BF16_PALETTE))}; as they are without it."
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help=f"Of linear layers outside the experts: {', '.join(DENSE)}; as they are without "
            "it. fp8 goes with fp8, the others with each other."
        ),
    ] = None,
    revision: options.Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of a file.")] = "4GiB",
    json: options.Json = False,
) -> None:
    """Writes a pack: experts one after another, each read in one go, in fewer bits if asked."""
    with quiet_interrupts():
        from moeinf.packing.pack import pack
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
               TransferSpeedColumn())  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("Packing", total=None)
        report = pack(
            source,
            dest,
            format=format,
            dense=dense,
            revision=revision,
            max_shard_size=max_shard_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        print_json(asdict(report))
        return
    written = report.bytes - report.resumed_bytes
    facts = {
        "source": human_bytes(report.source_bytes),
        "pack": f"{human_bytes(report.bytes)} in {report.files} files",
        "format": report.format or "as in the source, to the bit",
        "linear layers": report.dense or "as in the source",
        "an expert": "one read" if report.one_read else "a read for each tensor of all experts",
        "written": f"{human_bytes(written)} at {written / report.seconds / 1e9:.2f} GB/s",
    }
    for matrix, formats in report.weights.items():
        facts[matrix] = formats
    for module, error in report.errors.items():
        facts[f"error, {module}"] = f"{error:.2%} of the output"
    print_facts(report.path, facts)

"""`moeinf doctor`: facts about this machine, measured in seconds, and missing parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeinf import _core, machine, profiles
from moeinf.cache import disk_tuning, gather_tuning
from moeinf.cli import options
from moeinf.cli.output import console, human_bytes, print_facts, print_json
from moeinf.errors import CapacityError, UnsupportedError


def command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where checkpoints lie: the disk to measure.", exists=True, file_okay=False
        ),
    ] = Path(),
    json: options.Json = False,
) -> None:
    """Measures memory, disk and copies to a GPU; lists instruction sets, drivers and versions."""
    with console(stderr=True).status("Measuring memory, disk and copies to the GPU"):
        facts = machine.describe(folder)
        for index, gpu in enumerate(facts["cuda"]["devices"]):
            gpu["copies"] = _copies(index)
        if reader := facts.get("disk", {}).get("reader"):
            reader |= _kept(folder, reader)
    facts["missing"] = machine.missing(facts)
    facts["profiles"] = profiles.described()
    if json:
        print_json(facts)
        return
    disk, cuda, quota = facts["disk"], facts["cuda"], facts["cpu_quota"]
    print_facts(
        "This machine",
        {
            "processor": f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads for "
            "experts and linear layers",
            "this process": f"may use {facts['affinity']} cores on {facts['numa_nodes']} NUMA "
            + ("node" if facts["numa_nodes"] == 1 else "nodes")
            + (", no quota" if quota is None else f", a quota of {quota:g} cores"),
            "CPU kernels": ", ".join(
                f"{name}{'' if supported else ' (not here)'}"
                for name, supported in facts["cpu_kernels"].items()
            )
            + f"; {facts['cpu_kernel_used']} is used",
            "memory": f"{human_bytes(facts['memory_bytes'])}, reads at "
            f"{facts['memory_read_bandwidth'] / 1e9:.1f} GB/s",
            "disk": f"not measured: {disk['failed']}"
            if "failed" in disk
            else f"reads at {disk['bytes_per_second'] / 1e9:.2f} GB/s, O_DIRECT "
            + ("works" if disk["direct"] else "is refused")
            + _reading(disk["reader"]),
            "io_uring": "available (not used: see benchmarks/notes/transfer.md)"
            if facts["io_uring"]
            else "not available (not needed)",
            **({} if cuda["devices"] else {"GPU": f"none: {cuda['reason']}"}),
            **{
                f"GPU {index}": f"{gpu['name']}, {human_bytes(gpu['free_bytes'])} of "
                f"{human_bytes(gpu['total_bytes'])} free, gather kernel "
                + ("built in" if gpu["gather_kernel"] else "not built in")
                + f"; {_in_words(gpu['copies'])}"
                for index, gpu in enumerate(cuda["devices"])
            },
            **{
                f"tuned, {one['path'] or one['file']}": f"ignored: {one['fault']}"
                if one["fault"]
                else ", ".join(f"{name}={value}" for name, value in one["settings"].items())
                or "nothing was better than what is usual"
                for one in facts["profiles"]
            },
            **{name: version or "not installed" for name, version in facts["versions"].items()},
        },
    )
    for note in facts["missing"]:
        print(f"- {note}")


def _copies(index: int) -> dict[str, Any]:
    """Times DMA against gather on that GPU and saves the result for `ExpertCache`."""
    try:
        device = _core.CudaDevice(index)
        measured = gather_tuning.measure(device)
        return measured | {"kept_in": str(gather_tuning.store(device, measured))}
    except (CapacityError, UnsupportedError, OSError) as error:
        return {"failed": str(error)}


def _kept(folder: Path, reader: dict[str, Any]) -> dict[str, str]:
    """Saves how experts are read best from that disk, for `ExpertCache`."""
    try:
        return {"kept_in": str(disk_tuning.store(folder, reader))}
    except OSError as error:
        return {"failed": str(error)}


def _reading(reader: dict[str, Any]) -> str:
    if not reader["rows"]:
        return ""
    best = max(reader["rows"], key=lambda row: row["bytes_per_second"])
    way = f"{best['threads']} threads in chunks of {human_bytes(best['chunk_bytes'])}"
    usual = reader["rows"][0]["bytes_per_second"]
    if not (reader["threads"] or reader["chunk_bytes"]):
        way = f"nothing was faster than usual by {disk_tuning.MARGIN - 1:.0%}"
    else:
        way += f" are {best['bytes_per_second'] / usual:.2f} times as fast as usual"
    kept = (
        f"kept in {reader['kept_in']}" if "kept_in" in reader else f"not kept: {reader['failed']}"
    )
    return f"; experts at {usual / 1e9:.2f} GB/s, {way} ({kept})"


def _in_words(copies: dict[str, Any]) -> str:
    if "failed" in copies:
        return f"copies to it were not measured: {copies['failed']}"
    largest = copies["rows"][-1]["dma"]
    below = copies["gather_below"]
    gather = f"gather is faster up to {human_bytes(below)}" if below else "DMA is never slower"
    return f"copies at {largest / 1e9:.1f} GB/s, {gather} (kept in {copies['kept_in']})"

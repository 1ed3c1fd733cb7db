"""Block sizes by kernel, device and geometry, looked up in tuning.json; nothing is timed here.

A row of the table names a kernel, the conditions under which it holds ("*" for any) and a
configuration; the matching row with the most, and the most telling, conditions wins. A choice may
depend on the call's shapes but never on residency or on the number of slots, for results do not
either. `python -m benchmarks.tune` adds rows measured on the machine at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuning.json")
FORMAT = "moeinf-tuning-1"
# Conditions from least to most telling: a row that fixes a later one beats any that do not.
CONDITIONS = ("rows", "dtype", "order", "weights", "intermediate", "hidden", "device")


@lru_cache(maxsize=1)
def rows() -> tuple[dict[str, Any], ...]:
    table = json.loads(TABLE.read_text())
    if table.get("format") != FORMAT:
        raise ValueError(f"{TABLE}: expected format {FORMAT!r}, found {table.get('format')!r}")
    return tuple(table["rows"])


@lru_cache(maxsize=64)
def device_names(device: torch.device) -> tuple[str, ...]:
    """What a row may call this device: its full name, its architecture, or "*"."""
    if device.type != "cuda":
        return ("*",)
    major, minor = torch.cuda.get_device_capability(device)
    return (torch.cuda.get_device_name(device), f"sm_{major}{minor}", "*")


@lru_cache(maxsize=1024)
def config(
    kernel: str,
    devices: tuple[str, ...],
    *,
    dtype: str,
    hidden: int,
    intermediate: int,
    order: str = "rows",
    weights: str = "plain",
    rows_per_tile: int = 0,
) -> Mapping[str, int]:
    """The configuration for a call: block sizes, num_warps, num_stages. Read-only: calls share it.

    `order` is "rows" where weights are contiguous along the summed dimension, else "columns";
    `weights` is the name of their format, "plain" where it is the dtype of the tokens;
    `rows_per_tile` is BLOCK_M of the prefill kernels. Raises LookupError if no row matches.
    """
    asked = {
        "rows": rows_per_tile, "dtype": dtype, "order": order, "weights": weights,
        "intermediate": intermediate, "hidden": hidden,
    }  # fmt: skip
    best: tuple[int, dict[str, int]] | None = None
    for row in rows():
        if row["kernel"] != kernel or row.get("device", "*") not in devices:
            continue
        if any(row.get(name, "*") not in ("*", value) for name, value in asked.items()):
            continue
        score = sum(
            1 << place for place, name in enumerate(CONDITIONS) if row.get(name, "*") != "*"
        )
        # A device's full name tells more than its architecture.
        score = 2 * score + (row.get("device", "*") == devices[0] != "*")
        if best is None or score > best[0]:
            best = (score, row["config"])
    if best is None:
        raise LookupError(f"{TABLE.name}: no row for {kernel} on {devices} with {asked}")
    return MappingProxyType(best[1])

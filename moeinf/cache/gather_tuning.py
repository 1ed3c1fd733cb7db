"""How small experts reach a GPU: each by its copy engine (DMA), or several gathered by a kernel.

The faster way depends on the machine. `moeinf doctor` measures both and saves the result for this
user, in `gather.json` below XDG_CACHE_HOME. `ExpertCache` reads it. A result is valid for its GPU,
driver and version of moeinf. Without a result every copy is left to DMA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeinf import _core
from moeinf.cache.measured import Measured

KEPT = Measured("gather", "experts are copied by DMA")
SIZES = tuple(2**i for i in range(16, 25))  # bytes of an expert: 64 KiB to 16 MiB
AT_ONCE = 4  # experts, about what a decode step misses
ROUNDS = 10
MARGIN = 0.95
"""Of DMA's time, what a gather must stay below to count as faster: it keeps processors busy."""


def measure(device: _core.CudaDevice) -> dict[str, Any]:
    """Both ways over expert sizes, and `gather_below`: bytes up to which gathering was faster.

    Bytes per second, host time included, of AT_ONCE experts. Takes about a second, and 128 MiB of
    pinned RAM and of GPU memory.
    """
    rows = []
    for nbytes in SIZES:
        seconds = {
            "dma": device.time_copies(nbytes, AT_ONCE, False, ROUNDS),
            "gather": device.time_copies(nbytes, AT_ONCE, True, ROUNDS)
            if device.can_gather
            else None,
        }
        rows.append(
            {"nbytes": nbytes}
            | {path: AT_ONCE * nbytes / took if took else None for path, took in seconds.items()}
        )
    return {"rows": rows, "gather_below": threshold(rows)}


def threshold(rows: list[dict[str, Any]]) -> int:
    """The largest size up to which, from the smallest on, gathering was faster; 0: nowhere."""
    best = 0
    for row in rows:
        if not row["gather"] or row["dma"] > MARGIN * row["gather"]:
            break
        best = row["nbytes"]
    return best


def store(device: _core.CudaDevice, measured: dict[str, Any]) -> Path:
    """Keeps a measurement beside those of other GPUs. Raises OSError where it cannot be written."""
    return KEPT.put(_name(device), measured)


def stored(device: _core.CudaDevice) -> int | None:
    """`gather_below` as measured for this GPU, driver and version; None if it never was."""
    measured = KEPT.get(_name(device))
    if measured is None:
        return None
    below = measured.get("gather_below") if isinstance(measured, dict) else None
    if type(below) is not int or below < 0:
        KEPT.warn(f"gather_below is {below!r}, expected bytes")
        return None
    return below


def copy_path(device: _core.CudaDevice, gather_below: int | None) -> tuple[str, int]:
    """How experts reach that GPU: in words, and the size up to which they are gathered."""
    measured = stored(device) if gather_below is None else None
    below = measured or gather_below or 0
    if not device.can_gather:
        return "dma (this build has no gather kernel)", 0
    if gather_below is None:
        why = "never measured here: moeinf doctor" if measured is None else "measured by doctor"
    else:
        why = "as asked"
    return (f"gather up to {below} bytes, dma above" if below else "dma") + f" ({why})", below


def _name(device: _core.CudaDevice) -> str:
    return f"{device.name}, CUDA {device.driver_version}"

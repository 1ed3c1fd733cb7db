"""Facts about this machine. The system states them or they are measured; none is assumed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from moeinf import _core
from moeinf.cache import disk_tuning
from moeinf.cpus import allowed_cpus, cpu_name, cpu_quota, numa_nodes, usable_cpus
from moeinf.errors import CapacityError, UnsupportedError
from moeinf.memory_read import memory_read_bandwidth

DISK_SAMPLE_BYTES = 512 * 2**20
IO_URING_SETUP = 425  # the system call's number on every Linux architecture


def describe(folder: Path) -> dict[str, Any]:
    """Facts about the processor, memory, the disk that holds `folder`, and what is installed."""
    kernels = dict(_core.cpu_kernels())
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "affinity": allowed_cpus(),
        "cpu_quota": None if math.isinf(quota := cpu_quota()) else quota,
        "numa_nodes": numa_nodes(),
        "threads": usable_cpus(),
        "cpu_kernels": kernels,
        "cpu_kernel_used": next(name for name, supported in kernels.items() if supported),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_read_bandwidth": memory_read_bandwidth(),
        "disk": _disk(folder),
        "io_uring": _io_uring(),
        "cuda": _cuda(),
        "versions": {
            name: _version(name)
            for name in ("moeinf", "torch", "triton", "transformers", "safetensors", "numpy")
        },
    }


def missing(facts: dict[str, Any]) -> list[str]:
    """One sentence for each part whose absence makes this machine slower or less able."""
    notes = []
    if "failed" in facts["disk"]:
        notes.append(f"the disk was not measured: {facts['disk']['failed']}")
    elif not facts["disk"]["direct"]:
        notes.append(
            f"{facts['disk']['folder']}: the file system refuses O_DIRECT, so reads go through "
            "the page cache and are copied once more"
        )
    if facts["cpu_kernel_used"] == "portable":
        notes.append("the processor has neither AVX2 nor AVX-512: CPU kernels run portable code")
    devices = facts["cuda"]["devices"]
    if not devices:
        notes.append(f"no GPU, everything runs on the CPU: {facts['cuda']['reason']}")
    if any(not device["gather_kernel"] for device in devices):
        notes.append(
            "the core was built without its gather kernel: small experts are copied one by one"
        )
    if facts["versions"]["transformers"] is None:
        notes.append("transformers is not installed: pip install 'moeinf[hf]' to load models")
    if facts["versions"]["triton"] is None:
        notes.append("triton is not installed: the GPU kernels need it")
    return notes


def _disk(folder: Path) -> dict[str, Any]:
    """How fast a sample file in that folder is read, at most and expert by expert; or why not."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moeinf-doctor-") as file:
            block = os.urandom(2**20)
            for _ in range(DISK_SAMPLE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            measured = _core.read_bandwidth(file.name, 1.0)
            reader = disk_tuning.measure(Path(file.name))
    except OSError as error:
        reason = f"a sample file of {DISK_SAMPLE_BYTES:,} bytes: {error.strerror or error}"
        return {"folder": str(folder), "failed": reason}
    return {"folder": str(folder), **measured, "reader": reader}


def _io_uring() -> bool:
    """True if the kernel lets this process create an io_uring."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    descriptor = libc.syscall(IO_URING_SETUP, 1, parameters)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


def _cuda() -> dict[str, Any]:
    """Every GPU that the core can open. Without one, the reason."""
    devices: list[dict[str, Any]] = []
    reason = None
    while reason is None:
        try:
            device = _core.CudaDevice(len(devices))
        except (UnsupportedError, CapacityError, ValueError) as error:
            reason = str(error)
        else:
            devices.append(
                {
                    "name": device.name,
                    "free_bytes": device.free_bytes,
                    "total_bytes": device.total_bytes,
                    "gather_kernel": device.can_gather,
                    "fake": device.is_fake,
                }
            )
    return {"devices": devices, "reason": None if devices else reason}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

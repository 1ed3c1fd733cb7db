"""Lets Triton compile and launch as on an H100 in a process without a GPU; nothing is computed.

Triton's own code runs, down to the driver's functions. recording_driver/ replaces these functions
and notes the launches. Call `install` before the first kernel, in a separate process.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from built_library import built_library

SOURCES = Path(__file__).parent / "recording_driver"
STREAM = 0x5EA


class Launch(ctypes.Structure):
    """What the driver was asked for; `parameters` are 8 bytes from where each begins."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * 64),
    )


def install() -> ctypes.CDLL:
    """Makes the recording driver Triton's, and returns it; see recording_driver/driver.cpp."""
    path = built_library(SOURCES, "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    plain = path.with_name("libcuda.so")
    if not plain.exists():
        plain.symlink_to(path.name)
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    os.environ["TRITON_CACHE_DIR"] = str(path.parent / "triton")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        """Asks torch for nothing: it has no CUDA here."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=0: STREAM

    driver.set_active(Driver())
    return library

"""Builds the fake CUDA driver, which tests name in MOEINF_CUDA_DRIVER for a process of their own.

`fake_cuda_library()` returns its path; what steers it is in fake_cuda/fake_cuda.h, for ctypes.
"""

from __future__ import annotations

import functools
from pathlib import Path

from built_library import built_library

SOURCES = Path(__file__).parent / "fake_cuda"


@functools.cache
def fake_cuda_library() -> Path:
    return built_library(SOURCES, "libfake_cuda.so")

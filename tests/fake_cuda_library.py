"""Builds the fake CUDA driver, which tests name in MOEINF_CUDA_DRIVER for a process of their own.

`fake_cuda_library()` returns its path; what steers it is in fake_cuda/fake_cuda.h, for ctypes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "fake_cuda"


@functools.cache
def fake_cuda_library() -> Path:
    """Compiles it once per version of its sources; a few seconds, then the built one is found."""
    sources = sorted(SOURCES.glob("*.cpp"))
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-shared", "-fPIC",
        "-fvisibility=hidden", "-pthread",
    ]  # fmt: skip
    digest = hashlib.sha256(" ".join(command).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"moeinf-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"libfake_cuda-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        # Under a name of its own until it is whole: tests of another process may build it too.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            subprocess.run([*command, *map(str, sources), "-o", str(built)], check=True)
            built.rename(library)
    return library

"""Compiles the shared libraries that stand in for CUDA's driver, once per version of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path


def built_library(sources: Path, name: str, *flags: str) -> Path:
    """Path of `name`, made of every .cpp in `sources`; a few seconds the first time."""
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-shared", "-fPIC",
        "-fvisibility=hidden", "-pthread", *flags,
    ]  # fmt: skip
    digest = hashlib.sha256(" ".join(command).encode())
    for source in sorted(sources.iterdir()):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"moeinf-{sources.name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / digest.hexdigest()[:16] / name
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        # Under a name of its own until it is whole: tests of another process may build it too.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / name
            parts = map(str, sorted(sources.glob("*.cpp")))
            subprocess.run([*command, *parts, "-o", str(built)], check=True)
            built.rename(library)
    return library

"""Where the C interface lies: the header `moeinf.h` and the library `libmoeinf.so`."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent


def get_include() -> str:
    """The folder of `moeinf.h`, for a compiler's -I."""
    return str(HERE / "include")


def get_library() -> str:
    """The path of `libmoeinf.so`. The folder pkgconfig beside it holds `moeinf.pc`."""
    return str(HERE / "lib" / "libmoeinf.so")

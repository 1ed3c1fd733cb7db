"""Gives Triton's interpreter the rounding of a GPU where it casts float32 to bfloat16.

The interpreter cuts the lower 16 bits off; every GPU rounds to nearest, ties to even. Installed by
conftest.py for the tests of this folder alone, and checked against torch by test_rounding.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 as uint16, ties to even, any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN must not be carried into infinity.
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).reshape(np.shape(values))


def install() -> None:
    """Replaces the interpreter's cast. Raises RuntimeError if this Triton has no such function."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = getattr(interpreter, "InterpreterBuilder", None)
    handle: Any = getattr(interpreter, "TensorHandle", None)
    cast = getattr(builder, "cast_impl", None)
    found = list(inspect.signature(cast).parameters) if cast else None
    if handle is None or found != ["self", "src", "dst_type"]:
        raise RuntimeError(
            f"triton {triton.__version__}: expected InterpreterBuilder.cast_impl(self, src, "
            f"dst_type) and TensorHandle in triton.runtime.interpreter, found {found}; the tests' "
            "rounding to bfloat16 has to follow"
        )

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(nearest_bfloat16(src.data), dst_type.scalar)
        return cast(self, src, dst_type)

    builder.cast_impl = cast_impl

"""Runs Mixture-of-Experts models larger than fast memory: experts cached in slots."""

try:
    from moeinf import _core
except ImportError as error:
    raise ImportError(
        "moeinf's compiled core is missing here. In a source checkout install the package first: "
        "`pip install -e .` (or `python setup.py build_ext --inplace`)."
    ) from error

__all__ = ["_core"]

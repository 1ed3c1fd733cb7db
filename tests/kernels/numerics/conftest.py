"""These tests run the kernels themselves: on a GPU as they are, else under Triton's interpreter.

The interpreter must be chosen before Triton is imported. So without a GPU these tests are collected
only in a process with TRITON_INTERPRET=1, which test_kernels_interpreted.py starts.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import rounding

    rounding.install()

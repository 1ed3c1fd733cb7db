"""These tests run the kernels themselves: on a GPU as they are, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so without a GPU they are collected only
in a process started with TRITON_INTERPRET=1; test_kernels_interpreted.py starts it.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import rounding

    rounding.install()

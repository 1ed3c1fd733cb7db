"""Block sizes that suit tiny layers and odd edges, in place of the committed table.

They leave few programs for the interpreter to run, and sizes that no block divides. What the table
itself says is compiled by test_kernels_compile.py and run by test_committed_block_sizes.
"""

from __future__ import annotations

import pytest

from moeinf.kernels import launch_plan, tuning

COMMON = {"num_warps": 4, "num_stages": 1}
SMALL = {
    "gate_up_vector": {"BLOCK_I": 32, "BLOCK_H": 64, "STAGES": 1},
    "down_vector": {"ROUTES": 4, "BLOCK_H": 32, "BLOCK_I": 64, "STAGES": 1},
    "gate_up_shared": {"BLOCK_I": 32, "BLOCK_H": 64},
    "down_shared": {"BLOCK_H": 64, "BLOCK_I": 32},
    "gate_up_grouped": {"BLOCK_M": 16, "BLOCK_I": 32, "BLOCK_H": 64, "GROUP": 2},
    "down_grouped": {"BLOCK_M": 16, "BLOCK_H": 64, "BLOCK_I": 32, "GROUP": 2},
}


def use(patch: pytest.MonkeyPatch, **changes: int) -> None:
    def config(kernel: str, devices: tuple[str, ...], **asked: object) -> dict[str, int]:
        chosen = SMALL[kernel] | COMMON
        return chosen | {name: value for name, value in changes.items() if name in chosen}

    patch.setattr(tuning, "config", config)
    patch.setattr(launch_plan, "PLANS", {})  # what was planned with other blocks

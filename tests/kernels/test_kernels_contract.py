"""How the contract is reached: `moeinf.kernels.experts` is a module that can be called."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "way",
    [
        "import moeinf; experts = moeinf.kernels.experts",
        "import moeinf.kernels.experts; experts = moeinf.kernels.experts",
        "from moeinf.kernels import experts",
        "from moeinf.kernels.experts import experts",
    ],
)
def test_every_way_in_leads_to_the_same_function(way: str) -> None:
    code = f"""
{way}
import torch
try:
    experts(torch.zeros(0, 8), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1),
            torch.zeros(2, 8, 8), torch.zeros(2, 8, 4))
except ValueError as refusal:
    print(refusal)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected at least 1 token, found 0" in run.stdout, run.stderr


def test_the_package_alone_does_not_import_the_kernels() -> None:
    code = "import sys, moeinf; print([name for name in sys.modules if 'moeinf.kernels' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr

"""How the contract is reached: `moeinf.kernels.fused_experts`, however it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "way",
    [
        "import moeinf; fused_experts = moeinf.kernels.fused_experts",
        "import moeinf.kernels; fused_experts = moeinf.kernels.fused_experts",
        "from moeinf.kernels import fused_experts",
        "from moeinf.kernels.experts import fused_experts",
    ],
)
def test_every_way_in_leads_to_the_same_function(way: str) -> None:
    code = f"""
{way}
import torch
from moeinf.kernels import ExpertForm, ExpertMatrices
try:
    fused_experts(torch.zeros(0, 8), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1),
                  ExpertMatrices.of_fused(torch.zeros(2, 8, 8), torch.zeros(2, 8, 4)), ExpertForm())
except ValueError as refusal:
    print(refusal)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected at least 1 token, found 0" in run.stdout, run.stderr


@pytest.mark.parametrize(
    "module", ["moeinf", "moeinf.kernels", "moeinf.kernels.forms", "moeinf.checkpoint.store"]
)
def test_triton_is_imported_with_the_kernels_alone(module: str) -> None:
    code = f"import sys, {module}; print([name for name in sys.modules if name == 'triton'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_folder_of_the_kernels_is_no_package() -> None:
    """With an __init__.py it would hide Hugging Face's `kernels` from programs in the root."""
    from moeinf import kernels

    (folder,) = kernels.__path__
    assert not (Path(folder) / "__init__.py").exists()
    assert (Path(folder) / "tuning.json").exists()


def test_formats_are_those_of_checkpoints() -> None:
    from moeinf.checkpoint.formats import FORMATS
    from moeinf.kernels.formats import FORMATS as LOADED
    from moeinf.kernels.forms import PLAIN_FORMATS

    assert {name: row.values for name, row in FORMATS.items()} == {
        name: row.values for name, row in LOADED.items()
    }
    assert all(FORMATS[name].values == dtype for dtype, name in PLAIN_FORMATS.items())

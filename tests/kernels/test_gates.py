"""The table of gate functions: each torch line against the textbook, and against transformers.

No kernel runs here, and Triton need not be installed: numerics/ holds the Triton lines against the
same textbook.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moeinf.kernels.forms import ExpertForm, ExpertMatrices, Gate
from moeinf.kernels.gates import ACTIVATIONS, GATES, check_form, reference

sys.path.insert(0, str(Path(__file__).parent / "numerics"))
from textbook import gate_value

GATES_TO_TRY = [
    Gate(function, activation, alpha=1.702, limit=limit)
    for function, activation, limit in itertools.product(GATES, ACTIVATIONS, (0.5, 7.0))
    if activation == "silu" or "activation" in GATES[function].constants
]


@pytest.mark.parametrize("gate", GATES_TO_TRY, ids=str)
def test_torch_lines_are_the_textbook(gate: Gate, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    g, u = (torch.randn(200, generator=make, dtype=torch.float64) * 6 for _ in range(2))
    has_up = GATES[gate.function].has_up
    found = reference(gate, g, u if has_up else None)
    assert found.dtype == torch.float64
    expected = [gate_value(gate, float(x), float(y)) for x, y in zip(g, u, strict=True)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_constants_are_those_that_the_value_depends_on() -> None:
    g, u = torch.linspace(-9, 9, 50), torch.linspace(9, -8, 50)
    for function, row in GATES.items():
        base = Gate(function, "silu", alpha=1.5, limit=2.0)
        changed = {
            "activation": Gate(function, "gelu", 1.5, 2.0),
            "alpha": Gate(function, "silu", 2.5, 2.0),
            "limit": Gate(function, "silu", 1.5, 3.0),
        }
        for name, other in changed.items():
            depends = not torch.equal(reference(base, g, u), reference(other, g, u))
            assert depends == (name in row.constants), (function, name)


MODULES = (
    ("gpt_oss.modeling_gpt_oss", "GptOssExperts", "swiglu_oai", True),
    ("minimax_m3_vl.modeling_minimax_m3_vl", "MiniMaxM3VLExperts", "swiglu_oai", False),
    ("deepseek_v4.modeling_deepseek_v4", "DeepseekV4Experts", "clamped_glu", False),
    ("step3p7.modeling_step3p7", "Step3p7Experts", "glu_clamped", False),
)


@pytest.mark.parametrize("path,name,function,interleaved", MODULES, ids=[m[1] for m in MODULES])
def test_modules_of_transformers(path: str, name: str, function: str, interleaved: bool) -> None:
    """`_apply_gate` of the models that the rows name, where this transformers has them."""
    try:
        module = __import__(f"transformers.models.{path}", fromlist=[name])
    except ImportError:
        pytest.skip("this version of transformers does not have it")
    constants = SimpleNamespace(
        alpha=1.702, limit=2.0, swiglu_alpha=1.702, swiglu_limit=2.0, act_fn=torch.nn.SiLU()
    )
    rows = torch.randn(7, 24, dtype=torch.float64) * 4
    found = getattr(module, name)._apply_gate(constants, rows)
    g, u = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
    assert torch.allclose(found, reference(Gate(function, "silu", 1.702, 2.0), g, u), rtol=1e-12)


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"gate function: .*glu, plain, .* found 'swiglu'"):
        check_form(ExpertForm(Gate("swiglu")))
    with pytest.raises(ValueError, match=r"activation: expected one of silu, .* found 'swish'"):
        check_form(ExpertForm(Gate(activation="swish")))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="'glu': expected has_gate=True, found False"):
        check_form(ExpertForm(Gate("glu"), has_gate=False))
    with pytest.raises(ValueError, match="'plain': expected has_gate=False, found True"):
        check_form(ExpertForm(Gate("plain")))
    with pytest.raises(ValueError, match="uses no activation: expected 'silu', found 'gelu'"):
        check_form(ExpertForm(Gate("swiglu_oai", "gelu", 1.7, 7.0)))
    with pytest.raises(ValueError, match="expected a limit above 0, found -1"):
        check_form(ExpertForm(Gate("clamped_glu", limit=-1.0)))
    with pytest.raises(ValueError, match="expected a finite alpha above 0, found nan"):
        check_form(ExpertForm(Gate("softcap_swiglu", alpha=math.nan, limit=1.0)))
    for gate, words in (
        (Gate("swiglu_oai", alpha=math.inf), "finite alpha above 0, found inf"),
        (Gate("softcap_swiglu"), "finite limit above 0, found inf"),
    ):
        with pytest.raises(ValueError, match=words):
            check_form(ExpertForm(gate))
    check_form(ExpertForm(Gate("swiglu_oai", alpha=1.7)))
    check_form(ExpertForm(Gate("plain", "relu2"), has_gate=False))
    check_form(ExpertForm())


def test_the_table_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch
from moeinf.kernels.gates import reference
from moeinf.kernels.forms import Gate
print(float(reference(Gate(), torch.ones(1), torch.ones(1))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith("0.731"), run.stderr


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_matrices_of_fused_tensors(transposed: bool, interleaved: bool) -> None:
    gate, up, down = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    gate_bias, up_bias = torch.randn(3, 4), torch.randn(3, 4)
    fused, bias = torch.cat([gate, up], 1), torch.cat([gate_bias, up_bias], 1)
    if interleaved:
        fused = torch.stack([gate, up], 2).reshape(3, 8, 6)
        bias = torch.stack([gate_bias, up_bias], 2).reshape(3, 8)
    stored = [t.transpose(1, 2).contiguous() if transposed else t for t in (fused, down)]
    found = ExpertMatrices.of_fused(
        *stored, transposed=transposed, interleaved=interleaved, gate_up_bias=bias,
        down_bias=torch.zeros(3, 6),
    )  # fmt: skip
    assert found.up is not None
    assert torch.equal(found.gate.values, gate) and torch.equal(found.up.values, up)
    assert torch.equal(found.gate.bias, gate_bias) and torch.equal(found.up.bias, up_bias)
    assert torch.equal(found.down.values, down) and found.down.format == "f32"
    assert found.gate.values.untyped_storage().data_ptr() == stored[0].data_ptr()
    plain = ExpertMatrices.of_fused(gate, down, has_gate=False)
    assert plain.up is None and torch.equal(plain.gate.values, gate)
    with pytest.raises(TypeError, match=r"expected one of .* found torch.int8"):
        ExpertMatrices.of_fused(fused.to(torch.int8), down)

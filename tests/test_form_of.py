"""What a module of experts computes is found by asking it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations.moe import use_experts_implementation

from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.form import form_of
from moeinf.kernels.forms import ExpertForm, Gate

SIZES = {"hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 6}


def module_of(folder: str, experts: str, model_type: str | None = None, **config: Any) -> Any:
    """The experts module of a family, tiny, without its weights."""
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(modeling, experts)
    with torch.device("meta"):
        return kind(AutoConfig.for_model(model_type or folder, **SIZES, **config))


@pytest.mark.parametrize(
    "module, form",
    [
        (("qwen3_moe", "Qwen3MoeExperts"), ExpertForm()),
        (("mixtral", "MixtralExperts"), ExpertForm()),
        (("deepseek_v3", "DeepseekV3Experts"), ExpertForm()),
        (("olmoe", "OlmoeExperts"), ExpertForm()),
        (("beam", "BeamExperts"), ExpertForm()),
        (("gpt_oss", "GptOssExperts"),
         ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True)),
        (("deepseek_v4", "DeepseekV4Experts"), ExpertForm(Gate("clamped_glu", limit=10.0))),
        (("hy_v4", "HYV4Experts"), ExpertForm(Gate("clamped_glu", limit=10.0))),
        (("glm5_next", "Glm5NextTextExperts", "glm5_next_text"),
         ExpertForm(Gate("clamped_glu", limit=10.0))),
        (("minimax_m3_vl", "MiniMaxM3VLExperts", "minimax_m3_vl_text"),
         ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0))),
        (("inkling2", "Inkling2Experts", "inkling2_text"),
         ExpertForm(Gate("softcap_swiglu", alpha=4.0, limit=25.0))),
        (("nemotron_h", "NemotronHExperts"),
         ExpertForm(Gate("plain", "relu2"), has_gate=False)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_form_of_a_family(module: tuple[str, ...], form: ExpertForm) -> None:
    assert form_of(module_of(*module)) == form


@pytest.mark.parametrize("activation, ours", [
    ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"), ("relu2", "relu2"),
])  # fmt: skip
def test_the_activation(activation: str, ours: str) -> None:
    found = form_of(module_of("qwen3_moe", "Qwen3MoeExperts", hidden_act=activation))
    assert found == ExpertForm(Gate("glu", ours))


@pytest.mark.parametrize("limit", [0.5, 3.0, 40.0, 1000.0])
def test_the_constants_of_a_gate(limit: float) -> None:
    module = module_of("gpt_oss", "GptOssExperts", swiglu_limit=limit, swiglu_alpha=0.7)
    assert form_of(module).gate == Gate("swiglu_oai", alpha=0.7, limit=limit)
    module = module_of("deepseek_v4", "DeepseekV4Experts", swiglu_limit=limit, hidden_act="gelu")
    assert form_of(module).gate == Gate("clamped_glu", "gelu", limit=limit)


def test_a_limit_after_the_activation() -> None:
    modeling = importlib.import_module("transformers.models.step3p7.modeling_step3p7")
    config = AutoConfig.for_model("step3p5", **SIZES, num_local_experts=2)
    for limit, gate in ((7.0, Gate("glu_clamped", limit=7.0)), (None, Gate())):
        assert form_of(modeling.Step3p7Experts(config, limit)).gate == gate


class _Config:
    _experts_implementation = "eager"


def own(gate: Any, **attributes: Any) -> Any:
    """A module whose gate function is `gate`(module, concatenated)."""

    class Own(torch.nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self) -> None: ...

        def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
            return gate(self, *both.chunk(2, dim=-1))

    return use_experts_implementation(Own)(_Config())


@pytest.mark.parametrize(
    "gate",
    [
        lambda m, g, u: torch.nn.functional.silu(u) * g,
        lambda m, g, u: torch.nn.functional.silu(g) * u * 1.001,
        lambda m, g, u: torch.nn.functional.silu(g) * (u + 1),
        lambda m, g, u: torch.nn.functional.silu(g.clamp(max=7.5)) * u,
        lambda m, g, u: torch.nn.functional.silu(g.clamp(max=9)) * u.clamp(-7, 7),
        lambda m, g, u: g * torch.sigmoid(1.702 * g) * u,
        lambda m, g, u: torch.full_like(g, float("nan")),
        lambda m, g, u: torch.cat([g, u], -1),
    ],
)
def test_a_gate_that_has_no_row(gate: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"Own: its gate function is none of glu, .*add a r"):
        form_of(own(gate, limit=7.0, alpha=1.702))


def test_float32_on_the_way_is_no_other_gate() -> None:
    def gate(m: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(g.float()) * u.float()).to(g.dtype)

    assert form_of(own(gate)) == ExpertForm()


def test_the_attributes_that_old_versions_lack() -> None:
    module = module_of("qwen3_moe", "Qwen3MoeExperts")
    for name in ("has_gate", "is_concatenated", "has_post_expert_norm"):
        delattr(module, name)
    assert form_of(module) == ExpertForm()

"""The sum after an attention and the norm after it in one call: the bits of the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from transformers import AutoConfig, AutoModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import moeinf
from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.integrations.transformers.norms import serve_norms
from moeinf.integrations.transformers.residuals import serve_residuals

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (torch.bfloat16, torch.float32)


def is_served(module: Any) -> bool:
    return hasattr(module, "moeinf_normed_by")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call: did it compute?"""
    seen: list[bool] = []
    original = _core.add_rms_norm

    def counted(*given: Any) -> Any:
        made = original(*given)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(_core, "add_rms_norm", counted)
    return seen


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_of_the_sum_and_of_the_norm(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    for width in (8, 100, int(torch.randint(9, 3000, ()))):
        norm = Qwen3MoeRMSNorm(width).to(dtype).requires_grad_(False)
        norm.weight.copy_(torch.randn(width))
        serve_norms(torch.nn.Sequential(norm))
        for shape in ((1, 1), (2, 3), (7,), ()):
            one, other = (torch.randn(*shape, width).mul(9).to(dtype) for _ in range(2))
            made = _core.add_rms_norm(default_engine(), type(norm), norm, one, other)
            with torch.no_grad():
                expected = one + other, norm(one + other)
            assert all(map(torch.equal, made, expected))
        for given in (
            (one, other.double()),
            (one.half(), other.half()),
            (one[None], other),
            (one[None].expand(2, width), other[None].expand(2, width)),
            (one[1:], other[1:]),
        ):
            assert _core.add_rms_norm(default_engine(), type(norm), norm, *given) is None
        assert _core.add_rms_norm(default_engine(), torch.nn.Linear, norm, one, other) is None


def layers_of(family: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A model of one layer as it is, and with its layer served."""
    torch.manual_seed(seed)
    sizes = COMMON | {"num_hidden_layers": 1}
    plain: Any = AutoModel.from_config(AutoConfig.for_model(family, **sizes), dtype=dtype)
    plain.eval().requires_grad_(False)
    serve_norms(plain)
    served = copy.deepcopy(plain)
    serve_residuals(served)
    assert is_served(served.layers[0])
    return plain, served


def check(plain: Any, served: Any, tokens: int = 3) -> None:
    ids = torch.randint(0, COMMON["vocab_size"], (2, tokens))
    with torch.no_grad():
        found, expected = (model(ids).last_hidden_state for model in (served, plain))
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_layers_of_families(seed: int, calls: Any, family: str, dtype: torch.dtype) -> None:
    plain, served = layers_of(family, dtype, seed)
    assert served.state_dict().keys() == plain.state_dict().keys()
    for tokens in (1, 2, 40):
        check(plain, served, tokens)
    assert calls == [True] * 3


def double(module: Any) -> Any:
    return module.register_forward_hook(lambda module, given, result: 2 * result)


def wrap(layer: Any) -> None:
    layer.post_attention_layernorm = torch.nn.Sequential(layer.post_attention_layernorm)


def own_forward(layer: Any) -> None:
    norm = layer.post_attention_layernorm
    before = norm.forward
    norm.forward = lambda x: before(x) + 1


@pytest.mark.parametrize(
    "change", [lambda layer: double(layer.post_attention_layernorm), wrap, own_forward]
)
def test_a_norm_that_was_changed_runs_itself(
    seed: int, calls: Any, change: Callable[[Any], Any]
) -> None:
    models = layers_of("qwen3_moe", torch.float32, seed)
    check(*models)
    for model in models:
        change(model.layers[0])
    check(*models)
    assert calls == [True, False]


def test_gradients_compilation_hooks_and_casts(seed: int, calls: Any) -> None:
    plain, served = layers_of("qwen3_moe", torch.float32, seed)
    grads = []
    for model in (plain, served):
        model.train().requires_grad_(True).gradient_checkpointing_enable()
        model(torch.arange(6)[None]).last_hidden_state.square().sum().backward()
        grads.append([one.grad for one in model.parameters()])
        model.eval().requires_grad_(False)
    assert all(one is other or torch.equal(one, other) for one, other in zip(*grads, strict=True))
    for model in (plain, served):
        model.layers[0].mlp = torch.nn.Identity()
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    check(plain, compiled)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, result: 2 * result if isinstance(module, Qwen3MoeRMSNorm) else None
    )
    check(plain, served)
    handle.remove()
    assert not calls
    for dtype in TYPES:
        plain, served = plain.to(dtype), copy.deepcopy(served).to(dtype)
        for model in (plain, served):
            model.layers[0].post_attention_layernorm.variance_epsilon = 0.25
        check(plain, served)
    assert calls == [True, True]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_loaded_model_is_served_in_every_layer(
    tmp_path: Path, seed: int, dtype: torch.dtype
) -> None:
    model = moeinf.load(write_checkpoint(tmp_path / "model"), dtype=dtype)
    served = [one for one in model.modules() if hasattr(one, "moeinf_rest")]
    kinds = {type(one).__bases__[0].__name__ for one in served}
    assert {"_Attention", "_Layer"} <= kinds
    torch.manual_seed(seed)
    prompt = torch.randint(0, COMMON["vocab_size"], (1, 4))
    found = []
    for side in ("served", "plain"):
        if side == "plain":
            for one in served:
                one.__class__ = type(one).__bases__[1]
        out = model.generate(
            prompt, max_new_tokens=5, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found.append(torch.stack(out.logits))
    assert torch.equal(*found)


def test_a_forward_of_the_models_class_that_is_replaced_later(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In models that are served already, and in those that are loaded then."""
    folder = write_checkpoint(tmp_path / "model", seed=seed)
    prompt = torch.randint(0, 97, (1, 3), generator=torch.Generator().manual_seed(seed))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(prompt).logits

    models = [moeinf.load(folder, device="cpu", linear=linear) for linear in ("auto", "torch")]
    before = logits(models[0])
    layer = models[1].model.layers[1]
    for kind in (type(layer), type(layer.self_attn), type(layer.mlp.gate)):
        original = kind.forward

        def changed(self: Any, *given: Any, _original: Any = original, **named: Any) -> Any:
            made = _original(self, *given, **named)
            parts = made if isinstance(made, tuple) else (made,)
            halves = tuple(
                one * 0.5 if torch.is_tensor(one) and one.is_floating_point() else one
                for one in parts
            )
            return halves if isinstance(made, tuple) else halves[0]

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", changed)
            found = [logits(one) for one in (models[0], moeinf.load(folder, device="cpu"))]
            assert not torch.equal(found[0], before), kind
            torch.testing.assert_close(found[0], logits(models[1]), rtol=1e-4, atol=1e-4)
            assert torch.equal(*found), kind
        assert torch.equal(logits(models[0]), before)

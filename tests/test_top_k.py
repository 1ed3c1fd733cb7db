"""Routers that choose in one call: torch's choice among equal probabilities, or torch itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moeinf import _core
from moeinf.integrations.transformers import top_k
from moeinf.integrations.transformers.top_k import MOST_TOKENS, serve_routers

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (torch.bfloat16, torch.float32)
HIDDEN = 16


def qwen(experts: int, k: int, shares: bool) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=shares
    )
    return Qwen3MoeTopKRouter(config)


def mixtral(experts: int, k: int, _: bool) -> Any:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=k)
    return MixtralTopKRouter(config)


def pair(make: Callable[..., Any], dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A router as it is and served. Its weights make many logits equal."""
    rng = random.Random(seed)
    experts = rng.choice([6, 8, 60, 64, 128, 300])
    torch.manual_seed(seed)
    plain = make(experts, rng.randint(1, min(experts, 9)), rng.random() < 0.5).eval()
    plain = plain.requires_grad_(False).to(dtype)
    plain.weight.copy_(torch.randint(-2, 3, plain.weight.shape))
    served = copy.deepcopy(plain)
    serve_routers(torch.nn.Sequential(served))
    return plain, served


def check(plain: Any, served: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        for found, expected in zip(served(x), plain(x), strict=True):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("make", [qwen, mixtral])
def test_choices_and_weights_are_those_of_the_model(seed: int, make: Any, dtype: Any) -> None:
    plain, served = pair(make, dtype, seed)
    if not hasattr(served, "moeinf_rest"):
        pytest.skip("this transformers has another router")
    assert isinstance(served, type(plain)) and type(served).__name__ == type(plain).__name__
    for tokens in range(1, MOST_TOKENS + 2):
        check(plain, served, torch.randint(-2, 3, (tokens, HIDDEN)).to(dtype) / 4)
        check(plain, served, torch.randn(tokens, HIDDEN).to(dtype))
    for other in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, HIDDEN).to(dtype)
        x[1, 2] = other
        check(plain, served, x)


def test_what_was_changed_runs_as_the_models_own(seed: int, monkeypatch: Any) -> None:
    plain, served = pair(qwen, torch.float32, seed)
    if not hasattr(served, "moeinf_rest"):
        pytest.skip("this transformers has another router")
    x = torch.randn(5, HIDDEN)
    for dtype in (torch.float16, torch.float64, *TYPES):
        plain, served = plain.to(dtype), copy.deepcopy(served).to(dtype)
        check(plain, served, x.to(dtype))
    plain.top_k = served.top_k = 7 - min(plain.top_k, 6)
    plain.norm_topk_prob = served.norm_topk_prob = not plain.norm_topk_prob
    check(plain, served, x)
    seen: list[Any] = []
    hook = served.register_forward_hook(lambda module, given, result: seen.append(result))
    check(plain, served, x)
    hook.remove()
    assert len(seen[0]) == 3
    grads = []
    for module in (plain, served):
        module.requires_grad_(True)
        module(x)[1].square().sum().backward()
        grads.append(module.weight.grad)
    assert torch.equal(*grads)
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    check(plain, compiled, x)
    with torch.autocast("cpu", torch.bfloat16):
        check(plain, served, x)
    monkeypatch.setattr(top_k._Router, "moeinf_top_k", staticmethod(lambda *_: None))
    check(plain, served, x)


def test_a_sort_that_is_not_torchs_is_not_used(monkeypatch: Any) -> None:
    original = _core.top_k

    def reversed_ties(probabilities: Any, like: Any, k: int, shares: bool) -> Any:
        weights, ids = original(probabilities.flip(1), like, k, shares)
        return weights, probabilities.shape[1] - 1 - ids

    monkeypatch.setattr(_core, "top_k", reversed_ties)
    assert not top_k._chooses_like_torch.__wrapped__(128, 8)
    monkeypatch.undo()
    assert top_k._chooses_like_torch.__wrapped__(128, 8)


def test_what_the_core_does_not_take_it_leaves() -> None:
    rows = torch.rand(2, 8)
    for call in (
        (rows[:, ::2], rows, 2, True),
        (rows.double(), rows, 2, True),
        (rows, rows.half(), 2, True),
        (rows, rows[:1], 2, True),
        (rows[0], rows, 2, True),
        (rows, rows, 9, True),
        (rows, rows, 0, True),
        (rows[:0], rows[:0], 2, True),
    ):
        assert _core.top_k(*call) is None

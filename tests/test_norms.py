"""Root mean square norms in one call: the bits of the model's own, or the model's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
)

import moeinf
from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.integrations.transformers.norms import serve_norms

KINDS = (Qwen3MoeRMSNorm, GptOssRMSNorm, Qwen3NextRMSNorm)
TYPES = (torch.bfloat16, torch.float32)
MOST = 8192  # columns


class OtherRMSNorm(Qwen3MoeRMSNorm):
    """Adds its epsilon elsewhere: close, and not the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (x / root).to(x.dtype)


def norm_of(kind: Any, width: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """A norm with a random weight, as it is and served."""
    plain = kind(width).to(dtype).requires_grad_(False)
    plain.weight.copy_(torch.randn(width))
    served = torch.nn.Sequential(copy.deepcopy(plain))
    serve_norms(served)
    return plain, served[0]


def is_served(module: Any) -> bool:
    return hasattr(module, "moeinf_norm")


def check(plain: Any, served: Any, x: torch.Tensor) -> None:
    with torch.inference_mode():
        found, expected = served(x), plain(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), (x.shape, x.stride())
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_model(seed: int, kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    for width in (1, 7, 8, 64, 100, 128, int(torch.randint(9, 3000, ())), 2048, MOST):
        plain, served = norm_of(kind, width, dtype)
        assert is_served(served) and type(served).__name__ == kind.__name__
        size = torch.rand(()) * 100
        for shape in ((), (1, 1), (1, 1, 4), (1, 5, 3), (70,), (3, 1)):
            wide = (torch.randn(*shape, width + 3) * size).to(dtype)
            check(plain, served, wide[..., :width])
            check(plain, served, wide[..., :width].contiguous())
        check(plain, served, (torch.randn(width, 5) * size).to(dtype).T)
        check(plain, served, torch.zeros(2, width).neg().to(dtype))


def test_nan_and_infinity_stay_in_their_rows(seed: int) -> None:
    torch.manual_seed(seed)
    plain, served = norm_of(Qwen3MoeRMSNorm, 128, torch.bfloat16)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    with torch.inference_mode():
        found, expected = served(x), plain(x)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_prompts_of_several_threads_have_the_same_bits(seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(300, 640), torch.randn(640)
    norm = _core.RmsNorm(1e-5, 0.0, True)
    expected = [_core.rms_norm(default_engine(), norm, row[None], weight) for row in x]
    for threads in (1, 2, 5):
        engine = _core.CpuEngine(threads=threads)
        assert torch.equal(_core.rms_norm(engine, norm, x, weight), torch.cat(expected))


def test_what_the_core_does_not_take_it_leaves() -> None:
    norm, engine = _core.RmsNorm(1e-6, 0.0, True), default_engine()
    x, weight = torch.randn(2, 16), torch.randn(16)
    for call in (
        (x, weight[:15]),
        (x[:, ::2], weight[:8]),
        (x, weight[None]),
        (x[:0], weight),
        (x[:, :0], weight[:0]),
        (x.half(), weight.half()),
        (x.bfloat16(), weight),
        (x.to("meta"), weight),
        (torch.randn(()), weight),
        (torch.randn(1, MOST + 1), torch.randn(MOST + 1)),
    ):
        assert _core.rms_norm(engine, norm, *call) is None


def test_norms_with_other_bits_are_left_alone() -> None:
    hooked = Qwen3MoeRMSNorm(64)
    hooked.register_forward_hook(lambda module, given, result: 2 * result)
    for module in (
        OtherRMSNorm(64), Qwen3NextRMSNormGated(64), torch.nn.LayerNorm(64), hooked,
        Qwen3MoeRMSNorm(64).half(), Qwen3MoeRMSNorm(64).double(),
        Qwen3MoeRMSNorm(64).to("meta"),
    ):  # fmt: skip
        kind = type(module)
        serve_norms(torch.nn.Sequential(module))
        assert type(module) is kind and not is_served(module)


def test_a_served_norm_that_is_changed_is_the_models_own(seed: int) -> None:
    torch.manual_seed(seed)
    plain, served = norm_of(Qwen3MoeRMSNorm, 64, torch.float32)
    x = torch.randn(3, 64)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        check(plain.to(dtype), served.to(dtype), x.to(dtype))
    for one in (plain, served):
        one.weight = torch.nn.Parameter(torch.arange(64.0))
    check(plain, served, x)
    hook = served.register_forward_hook(lambda module, given, result: 2 * result)
    with torch.inference_mode():
        assert torch.equal(served(x), 2 * plain(x))
    hook.remove()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(served(x), plain(x))
    grads = []
    for one in (plain, served):
        given = x.clone().requires_grad_()
        one(given).square().sum().backward()
        grads.append((given.grad, one.weight.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), plain(x))
        mapped = torch.func.vmap(lambda row: served(row))(x)
    torch.testing.assert_close(mapped, plain(x))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_loaded_model_gives_the_same_logits_without(
    tmp_path: Path, seed: int, dtype: torch.dtype
) -> None:
    model = moeinf.load(write_checkpoint(tmp_path / "norms"), dtype=dtype)
    norms = [one for one in model.modules() if is_served(one)]
    assert len(norms) == sum("RMSNorm" in type(one).__name__ for one in model.modules())
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for side in ("served", "plain"):
        if side == "plain":
            for one in norms:
                one.__class__ = type(one).__mro__[2]
        for length in (1, 3, 40):
            generator.manual_seed(seed)
            prompt = torch.randint(0, COMMON["vocab_size"], (1, length), generator=generator)
            with torch.inference_mode():
                found[side, length] = model(prompt).logits
    for length in (1, 3, 40):
        assert torch.equal(found["served", length], found["plain", length])


@pytest.mark.parametrize("loaded", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_is_changed_later_is_still_the_models(
    seed: int, kind: Any, loaded: torch.dtype
) -> None:
    """Cast to another type, copied, or given another epsilon."""
    torch.manual_seed(seed)
    for dtype in (*TYPES, torch.float16):
        plain, served = norm_of(kind, 64, loaded)
        plain, served = plain.to(dtype), copy.deepcopy(served).to(dtype)
        x = torch.randn(4, 64).to(dtype)
        check(plain, served, x)
        for module in (plain, served):
            setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", 0.5)
        check(plain, served, x)

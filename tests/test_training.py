"""Gradients of a served model: of the experts' inputs right, of the experts themselves refused.

The reference is autograd of float64 sums over one route at a time, and transformers' eager model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library
from safetensors.torch import save_file
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.index import split_fused
from moeinf.errors import UnsupportedError
from moeinf.kernels.forms import ExpertForm, Gate

E, H, I, T, K = 5, 24, 16, 11, 3  # noqa: E741
Values = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The value of each gate function with alpha 1.3 and limit 0.6, and the form that names it.
FORMS: dict[str, tuple[Gate, Values]] = {
    "glu": (Gate(), lambda g, u: g / (1 + torch.exp(-g)) * u),
    "gelu": (
        Gate(activation="gelu"),
        lambda g, u: g * (1 + torch.erf(g / 2**0.5)) / 2 * u,
    ),
    "plain": (Gate("plain", "relu2"), lambda g, u: torch.where(g > 0, g * g, 0.0)),
    "swiglu_oai": (
        Gate("swiglu_oai", alpha=1.3, limit=0.6),
        lambda g, u: (
            (torch.clip(u, -0.6, 0.6) + 1)
            * torch.clip(g, max=0.6)
            / (1 + torch.exp(-1.3 * torch.clip(g, max=0.6)))
        ),
    ),
    "softcap_swiglu": (
        Gate("softcap_swiglu", alpha=1.3, limit=0.6),
        lambda g, u: 1.3 * torch.tanh(g / 1.3) / (1 + torch.exp(-g)) * 0.6 * torch.tanh(u / 0.6),
    ),
}
# ||found - expected|| / ||expected||.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_sum_in_float64(
    name: str, dtype: torch.dtype, has_bias: bool, device: str, tmp_path: Path, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    gate, value = FORMS[name]
    parts = 1 if gate.function == "plain" else 2
    weights = {
        "gate_up": torch.randn(E, parts * I, H, generator=make) / H**0.5,
        "down": torch.randn(E, H, I, generator=make) / I**0.5,
    }
    if has_bias:
        weights |= {
            f"{n}.bias": torch.randn(w.shape[:2], generator=make) for n, w in weights.items()
        }
    weights = {n: w.to(dtype) for n, w in weights.items()}
    (tmp_path / "config.json").write_text("{}")
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)

    def key(name: str) -> tuple[str, str]:
        matrix, _, piece = name.partition(".")
        return ("gate" if parts == 1 and matrix == "gate_up" else matrix), piece or "values"

    slices = {key(n): split_fused(checkpoint.tensors[n], E) for n in weights}
    index = {"experts": [{k: found[e] for k, found in slices.items()} for e in range(E)]}
    form = ExpertForm(gate, has_gate=parts == 2, has_bias=has_bias)
    store = moeinf.ExpertStore(checkpoint, index, form=form, top_k=K)

    hidden = torch.randn(T, H, generator=make).to(dtype)
    ids = torch.randint(-1, E + 1, (T, K), generator=make)  # both ids that mean no expert, too
    ids[0], ids[1], ids[2] = torch.tensor([2, 2, 4]), torch.tensor([E, -1, E]), torch.arange(K)
    shares = torch.rand(T, K, generator=make)
    grad = torch.randn(T, H, generator=make).to(dtype)

    exact = {n: w.double() for n, w in weights.items()}
    x, s = hidden.double().requires_grad_(), shares.double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            e = int(ids[t, j])
            if not 0 <= e < E:
                continue
            first, biases = exact["gate_up"][e] @ x[t], exact.get("gate_up.bias")
            first = first if biases is None else first + biases[e]
            y = exact["down"][e] @ value(first[:I], first[-I:])
            y = y if biases is None else y + exact["down.bias"][e]
            loss = loss + s[t, j] * (y @ grad[t].double())
    loss.backward()
    assert x.grad is not None and s.grad is not None

    answers = []
    for slots in (1, 2, E):
        cache = moeinf.ExpertCache(store, device=device, slots=slots)
        found, routing = hidden.clone().requires_grad_(), shares.clone().requires_grad_()
        moeinf.fused_experts(found, ids, routing, cache, 0).backward(grad)
        assert found.grad is not None and routing.grad is not None
        answers.append((found.grad, routing.grad))
    assert close(answers[0][0], x.grad, TOLERANCE[dtype])
    assert close(answers[0][1], s.grad, TOLERANCE[dtype])
    assert torch.equal(answers[0][1][1], torch.zeros(K))
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_loss_has_the_gradients_of_the_whole_model(
    family: str, device: str, tmp_path: Path, seed: int
) -> None:
    """Of every parameter but the experts', with one slot, and where layers are computed again."""
    write_checkpoint(tmp_path, family, seed=seed)
    prompt = torch.randint(
        0, COMMON["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(seed)
    )
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    eager.train()(prompt, labels=prompt).loss.backward()
    for checkpointing in (False, True):
        served = moeinf.load(tmp_path, device=device, slots=1).train()
        if checkpointing:
            served.gradient_checkpointing_enable()
        with served.moeinf.cache.record() as recorder:
            served(prompt, labels=prompt).loss.backward()
        assert recorder.trace().experts.shape[0] == prompt.numel()  # not the layers once more
        for name, parameter in served.named_parameters():
            expected = eager.get_parameter(name).grad
            assert (parameter.grad is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


def test_what_has_no_derivative_says_so(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=2)
    ids, weights = torch.tensor([[0, 3], [3, 5]]), torch.ones(2, 2)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return moeinf.fused_experts(hidden, ids, weights, cache, 0)

    hidden = torch.randn(2, 40)
    with pytest.raises(UnsupportedError, match="its gradients have no derivative"):
        x = hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        grad.sum().backward()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward mode"):
            layer(forward_ad.make_dual(hidden, hidden))
        transforms: list[Callable[[], Any]] = [
            lambda: torch.func.jvp(layer, (hidden,), (hidden,)),
            lambda: torch.func.grad(lambda x: layer(x).sum())(hidden),
        ]
        for transform in transforms:
            with mode(), pytest.raises(UnsupportedError, match=r"torch\.func cannot"):
                transform()
    assert torch.isfinite(layer(hidden)).all()

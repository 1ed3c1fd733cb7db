"""Router probabilities in traces: what the model's routers computed, for every expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import COMMON, FAMILIES, write_checkpoint
from test_cli import moeinf as command

import moeinf
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.experts import experts_modules
from moeinf.integrations.transformers.routers import listen
from moeinf.traces.trace import Trace


def prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Without the ids of padding, which `generate` takes for padding in a prompt too.
    return torch.randint(2, COMMON["vocab_size"], shape, generator=generator)


def blocks_of(model: Any) -> list[Any]:
    return [model.get_submodule(name.rpartition(".")[0]) for name in experts_modules(model)]


def expected_router(model: Any, seen: list[list[torch.Tensor]], family: str) -> np.ndarray:
    """float64 [tokens, layers, experts], from the inputs that each layer's router saw."""
    layers = []
    for block, inputs in zip(blocks_of(model), seen, strict=True):
        hidden = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs]).double().numpy()
        logits = hidden @ block.gate.weight.detach().double().numpy().T
        if family == "deepseek_v3":
            layers.append(1 / (1 + np.exp(-logits)))
        else:
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            layers.append(powers / powers.sum(-1, keepdims=True))
    return np.stack(layers, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probabilities_are_those_the_model_chose_by(
    family: str, tmp_path: Path, seed: int
) -> None:
    if family == "deepseek_v2" and transformers.__version__.startswith("5.0."):
        pytest.skip("its block does not call its router")
    write_checkpoint(tmp_path, family, seed=seed)
    model = moeinf.load(tmp_path, slots=5)
    seen: list[list[torch.Tensor]] = [[] for _ in blocks_of(model)]
    with model.moeinf.cache.record(router=True) as recorder:
        for inputs, block in zip(seen, blocks_of(model), strict=True):
            block.gate.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].clone())
            )
        for turn in range(2):
            model.generate(prompt(seed + turn, 1, 5), max_new_tokens=7, do_sample=False)
    trace = recorder.trace()
    assert trace.router is not None and trace.info()["router"] is True
    np.testing.assert_allclose(trace.router, expected_router(model, seen, family), atol=1e-3)

    router = trace.router.astype(np.float64)
    if family != "deepseek_v3":
        np.testing.assert_allclose(router.sum(-1), 1, atol=4e-3)
    groups = FAMILIES[family].get("n_group", 1)
    chosen = np.zeros(router.shape, bool)
    np.put_along_axis(chosen, trace.experts.astype(np.int64), True, axis=-1)
    by_group = (*router.shape[:2], groups, -1)
    for scores, taken in zip(
        router.reshape(by_group).reshape(-1, router.shape[-1] // groups),
        chosen.reshape(by_group).reshape(-1, router.shape[-1] // groups),
        strict=True,
    ):
        if taken.any() and not taken.all():  # rounding to float16 keeps the order
            assert scores[taken].min() >= scores[~taken].max()


def test_a_batch_keeps_every_token_with_its_own(tmp_path: Path, seed: int) -> None:
    write_checkpoint(tmp_path)
    model = moeinf.load(tmp_path)
    inputs = prompt(seed, 3, 4)
    with model.moeinf.cache.record(router=True) as recorder:
        model.generate(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    trace = recorder.trace()
    assert trace.router is not None
    assert trace.sequence.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    # By probability, not by id: as recorded, two experts may be equally likely.
    greatest = -np.sort(-trace.router, axis=-1)[..., : trace.top_k]
    chosen = np.take_along_axis(trace.router, trace.experts.astype(np.int64), axis=-1)
    assert np.array_equal(-np.sort(-chosen, axis=-1), greatest)


def test_the_model_computes_the_same_and_is_left_as_it_was(qwen3_folder: Path, seed: int) -> None:
    model = moeinf.load(qwen3_folder, slots=5)
    with torch.inference_mode():
        expected = model(prompt(seed, 1, 6)).logits
        with model.moeinf.cache.record(router=True) as recorder:
            assert torch.equal(model(prompt(seed, 1, 6)).logits, expected)
        gates = [block.gate for block in blocks_of(model)]
        assert not any(gate._forward_hooks for gate in gates)
        tokens = recorder.trace().num_tokens
        model(prompt(seed, 1, 6))
        assert recorder.trace().num_tokens == tokens
        with model.moeinf.cache.record() as recorder:
            assert not any(gate._forward_hooks for gate in gates), "a plain record pays nothing"
            model(prompt(seed, 1, 6))
    assert recorder.trace().router is None


def run_by_hand(cache: Any, recorder: Any, tokens: int, give: Any) -> None:
    for layer in range(3):
        if (probabilities := give(layer, tokens)) is not None:
            recorder.add_router(layer, probabilities)
        ids = torch.tensor([[layer, 3]] * tokens)
        moeinf.fused_experts(torch.randn(tokens, 40), ids, torch.ones(tokens, 2), cache, layer)


def test_another_runtime_hands_them_in(qwen3_folder: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    given: list[list[torch.Tensor]] = [[], [], []]

    def give(layer: int, tokens: int) -> torch.Tensor:
        given[layer].append(torch.rand(tokens, 6))
        return given[layer][-1]

    with cache.record(router=True) as recorder:
        for tokens in (5, 1, 1, 5, 2):
            run_by_hand(cache, recorder, tokens, give)
    trace = recorder.trace()
    assert trace.router is not None
    expected = torch.stack([torch.cat(layer) for layer in given], dim=1)
    np.testing.assert_array_equal(trace.router, expected.half().numpy())
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(tmp_path / "t.safetensors")
    assert loaded.router is not None
    np.testing.assert_array_equal(loaded.router, trace.router)


def test_what_is_missing_or_misshapen_is_said(qwen3_folder: Path) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), slots=4)
    with cache.record(router=True) as recorder:
        run_by_hand(cache, recorder, 2, lambda layer, tokens: torch.full((tokens, 6), 0.5))
        run_by_hand(
            cache, recorder, 2, lambda layer, tokens: None if layer == 1 else torch.ones(tokens, 6)
        )
    with pytest.raises(ValueError, match="every layer of 2 passes, found for 1"):
        recorder.trace()
    recorder = cache.record(router=True)
    for wrong in (torch.ones(2, 5), torch.ones(6), torch.ones(2, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected floating point \[T, 6\], found"):
            recorder.add_router(0, wrong)
    with pytest.raises(ValueError, match="layer 0: expected 2 rows, found 3"):
        run_by_hand(cache, recorder, 2, lambda layer, tokens: torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"record\(router=True\)"):
        cache.record().add_router(0, torch.ones(2, 6))


def test_a_router_of_another_kind_is_refused(tmp_path: Path, seed: int) -> None:
    write_checkpoint(tmp_path)
    model = moeinf.load(tmp_path)

    def doubled(_: Any, args: Any, output: Any) -> Any:
        logits, weights, ids = output
        return logits, weights * torch.tensor([3.0, 1.0]), ids

    for block in blocks_of(model):
        block.gate.register_forward_hook(doubled)
    with pytest.raises(UnsupportedError, match=r"Qwen3MoeTopKRouter.*softmax or sigmoid"):
        model.moeinf.cache.record(router=True)
    model.generate(prompt(seed, 1, 4), max_new_tokens=2, do_sample=False)  # is served all the same
    with pytest.raises(UnsupportedError, match="Linear: its router cannot be called alone"):
        listen([torch.nn.Linear(2, 2)], lambda layer, probabilities: None)


def test_the_commands_record_them_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    command("run", "--max-new-tokens", "4", "--json", "--record", str(path), "--router")
    assert Trace.load(path).router is not None
    facts = json.loads(
        command("trace", "-o", str(path), "--max-new-tokens", "2", "--router", "--json").stdout
    )
    assert facts["router"] is True
    assert "--record" in command("run", "--router", expect=1).stderr

"""Prefetching by prediction: the same output, honest counts, and a gate that sees ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, FAMILIES, write_checkpoint
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.cache.statistics import prediction_summary
from moeinf.integrations.transformers.experts import experts_modules
from moeinf.integrations.transformers.lookahead import GateLookahead

KINDS = ["previous", "transition", "eam", "gate"]
DECODING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def random_prompt(seed: int, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], (1, tokens), generator=generator)


def logits_of(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    output = model.generate(
        prompt,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **DECODING,
    )
    return torch.cat(output.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_identical_to_the_bit_whatever_predicts(
    family: str, tmp_path: Path, seed: int
) -> None:
    write_checkpoint(tmp_path, family, seed=seed)
    prompt = random_prompt(seed)
    expected = logits_of(moeinf.load(tmp_path), prompt, 20)
    for kind in KINDS:
        model = moeinf.load(tmp_path, slots=5, prefetch=kind)
        assert torch.equal(logits_of(model, prompt, 20), expected), kind
        stats = model.moeinf.stats()
        prefetch = stats["prefetch"]
        assert prefetch["predictor"] == kind
        assert prefetch["steps"] >= 16
        assert prefetch["correct"] <= min(prefetch["predicted"], prefetch["used"])
        assert prefetch["recall"] == prefetch["correct"] / prefetch["used"]
        assert stats["hits"] + stats["misses"] == stats["accesses"]
        met_their_fate = stats["prefetch_useful_bytes"] + stats["prefetch_wasted_bytes"]
        assert met_their_fate <= stats["prefetch_bytes"]
        model.moeinf.reset_stats()
        assert model.moeinf.stats()["prefetch"]["steps"] == 0


class Listener:
    """Takes the place of a cache that always wants predictions."""

    wants_predictions = True

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.latest: dict[int, list[int]] = {}

    def predict(self, layer: int, choices: torch.Tensor) -> None:
        self.latest[layer] = choices.flatten().tolist()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_sees_ahead(family: str, on_gpu: bool, tmp_path: Path, seed: int) -> None:
    """Recall well above chance, for every family, and the very ids that the model's gates take."""
    write_checkpoint(tmp_path, family, seed=seed, num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in experts_modules(model)]
    listener = Listener(on_gpu=on_gpu)
    GateLookahead(blocks, listener)  # type: ignore[arg-type]
    right = wrong = 0

    def compare(layer: int, chosen: torch.Tensor) -> None:
        nonlocal right, wrong
        if chosen.shape[0] != 1 or layer == 0:
            return
        used = set(chosen.flatten().tolist())
        predicted = listener.latest.pop(layer)
        assert len(predicted) == len(used)
        right += len(used & set(predicted))
        wrong += len(used - set(predicted))

    for layer, block in enumerate(blocks):
        block.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: compare(layer, args[1])
        )
    model.generate(random_prompt(seed), max_new_tokens=40, min_new_tokens=40, **DECODING)
    experts = blocks[0].experts.num_experts
    chance = FAMILIES[family]["num_experts_per_tok"] / experts
    recall = right / (right + wrong)
    print(f"recall {recall:.2f}, chance {chance:.2f}, {right + wrong} experts")
    assert right + wrong >= 300
    assert recall > chance + 0.08


def test_prompts_are_not_predicted(qwen3_folder: Path, seed: int) -> None:
    model = moeinf.load(qwen3_folder, slots=5, prefetch="gate")
    with torch.inference_mode():
        model(random_prompt(seed, 1))
    assert not model.moeinf.cache.wants_predictions
    assert model.moeinf.stats()["prefetch"]["predicted"] == 0


def test_nothing_is_said_of_what_is_off(qwen3_folder: Path, seed: int) -> None:
    model = moeinf.load(qwen3_folder, slots=5)
    logits_of(model, random_prompt(seed), 4)
    stats = model.moeinf.stats()
    assert stats["prefetch"] is None
    assert stats["prefetch_bytes"] == 0
    cache = model.moeinf.cache
    cache.predict(1, [0, 1])  # nobody listens
    assert not cache.wants_predictions


def test_unknown_names_and_ids(qwen3_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"psychic.*previous, transition, eam"):
        moeinf.load(qwen3_folder, prefetch="psychic")
    cache = moeinf.load(qwen3_folder, prefetch="external").moeinf.cache
    for layer, experts in ((3, [0]), (-1, [0]), (0, [6]), (0, [-1])):
        with pytest.raises(ValueError, match="expected"):
            cache.predict(layer, experts)


def test_ratios_of_nothing_are_none() -> None:
    counts = dict.fromkeys(
        ("correct", "used", "predicted", "predicted_absent", "predicted_absent_used",
         "active_steps", "steps"), 0
    )  # fmt: skip
    summary = prediction_summary(counts)
    assert summary["recall"] is summary["precision"] is summary["active_share"] is None
    assert summary["precision_among_misses"] is None

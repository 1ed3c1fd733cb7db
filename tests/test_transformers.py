"""`moeinf.load` gives an ordinary model whose output does not depend on resident experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, FAMILIES, OWN_GATES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TextStreamer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
import moeinf.integrations.transformers  # registers the implementation
from moeinf.errors import CapacityError, CheckpointError, ReadError, UnsupportedError


def random_prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


def logits_of(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits


@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, original_names: bool, tmp_path: Path, seed: int
) -> None:
    write_checkpoint(tmp_path, family, seed=seed, original_names=original_names)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    served = moeinf.load(tmp_path, slots=3)
    assert isinstance(served, type(reference))
    prompt = random_prompt(seed, 2, 17)
    torch.testing.assert_close(
        logits_of(served, prompt), logits_of(reference, prompt), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", [name for name in OWN_GATES if name in CONFIG_MAPPING])
def test_logits_of_experts_with_a_gate_of_their_own(family: str, tmp_path: Path, seed: int) -> None:
    write_checkpoint(tmp_path, family, seed=seed)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    served = moeinf.load(tmp_path, slots=3)
    assert served.moeinf.cache.store.form.gate.limit == 0.5
    prompt = random_prompt(seed, 2, 17)
    torch.testing.assert_close(
        logits_of(served, prompt), logits_of(reference, prompt), rtol=1e-4, atol=1e-4
    )


def test_experts_of_another_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "moe_intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"expected .*\[6, 64, 40\]"):
        moeinf.load(tmp_path)


def test_a_block_that_predicts_several_tokens_is_left_out(
    qwen3_folder: Path, tmp_path: Path, seed: int
) -> None:
    """Its layers are counted from 0 too, and its experts are none of the model's."""
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    block = {n.replace("model.", "mtp."): t + 1 for n, t in tensors.items() if "layers.0.mlp" in n}
    save_file({**tensors, **block}, folder / "model.safetensors", {"format": "pt"})
    prompt = random_prompt(seed, 1, 6)
    expected = logits_of(moeinf.load(qwen3_folder), prompt)
    assert torch.equal(logits_of(moeinf.load(folder), prompt), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_in_half_precision(dtype: torch.dtype, tmp_path: Path, seed: int) -> None:
    # Every expert is routed to: rounding must not decide which ones are.
    write_checkpoint(tmp_path, seed=seed, dtype=dtype, num_experts_per_tok=6)
    served = moeinf.load(tmp_path, slots=2)
    assert served.dtype == dtype
    wide = moeinf.load(tmp_path, dtype="float32")
    assert wide.dtype == torch.float32
    prompt = random_prompt(seed, 1, 11)
    difference = (logits_of(served, prompt).float() - logits_of(wide, prompt)).abs().max()
    scale = logits_of(wide, prompt).abs().max()
    assert difference <= 0.05 * scale


@pytest.mark.parametrize("policy", ["lru", "lfu", "decayed_lfu"])
@pytest.mark.parametrize("slots", [1, 2, 5, 18])
def test_output_is_identical_to_the_bit_for_every_budget_and_policy(
    qwen3_folder: Path, slots: int, policy: str, seed: int
) -> None:
    prompt = random_prompt(seed, 3, 9)
    expected = logits_of(moeinf.load(qwen3_folder), prompt)
    served = moeinf.load(qwen3_folder, slots=slots, policy=policy)
    for _ in range(2):
        assert torch.equal(logits_of(served, prompt), expected)


def test_generation_matches_transformers(qwen3_folder: Path, seed: int) -> None:
    prompt = random_prompt(seed, 2, 5)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    reference = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    served = moeinf.load(qwen3_folder, memory="25%")
    assert torch.equal(
        served.generate(prompt, **arguments), reference.generate(prompt, **arguments)
    )


def test_streaming_works(qwen3_folder: Path, seed: int) -> None:
    class Tokens(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Tokens()
    output = moeinf.load(qwen3_folder, slots=4).generate(
        random_prompt(seed, 1, 4), max_new_tokens=6, do_sample=False, streamer=streamer
    )
    assert streamer.seen == [*output[0].tolist(), -1]


def test_statistics_add_up(qwen3_folder: Path, seed: int) -> None:
    model = moeinf.load(qwen3_folder, slots=4)
    model.generate(random_prompt(seed, 1, 4), max_new_tokens=5, do_sample=False)
    stats = model.moeinf.stats()
    assert stats["hits"] + stats["misses"] == stats["accesses"]
    assert len(stats["layers"]) == 3
    for name in ("accesses", "hits", "misses", "evictions", "demand_bytes"):
        assert stats[name] == sum(layer[name] for layer in stats["layers"])
    assert stats["demand_bytes"] == stats["misses"] * model.moeinf.cache.store.layout.nbytes
    model.moeinf.reset_stats()
    assert model.moeinf.stats()["accesses"] == 0


def test_the_experts_are_never_parameters(qwen3_folder: Path) -> None:
    model = moeinf.load(qwen3_folder, slots=1)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_a_file_that_fails_in_mid_run(qwen3_folder: Path, tmp_path: Path, seed: int) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))
    prompt = random_prompt(seed, 1, 6)
    model = moeinf.load(folder, slots=2)
    expected = logits_of(model, prompt)
    cache = model.moeinf.cache
    layer = next(layer for layer in range(3) if cache.resident(layer))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ReadError, match=r"model\.safetensors"):
        logits_of(model, prompt)
    for expert in cache.resident(layer):  # what is still there still serves
        with cache.acquire(layer, [expert]) as lease:
            down = cache.views()["down"][lease.slots[0]]
            assert torch.equal(
                down, moeinf.ExpertStore.open(qwen3_folder).read(layer, expert)["down"]
            )
    shutil.copy(qwen3_folder / "model.safetensors", folder)
    assert torch.equal(logits_of(moeinf.load(folder, slots=2), prompt), expected)


def test_a_budget_below_one_slot(qwen3_folder: Path) -> None:
    with pytest.raises(CapacityError, match="below one slot"):
        moeinf.load(qwen3_folder, memory=1000)


def test_an_unknown_policy(qwen3_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"psychic.*decayed_lfu"):
        moeinf.load(qwen3_folder, policy="psychic")


def test_an_unknown_architecture(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(CheckpointError, match=r"config\.json.*'mystery'"):
        moeinf.load(folder)


def test_a_model_without_one_layer_of_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "mlp_only_layers": [1]}))
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.down_proj"):
        moeinf.load(tmp_path)


def test_the_implementation_needs_a_loaded_model(qwen3_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    model.config._experts_implementation = "moeinf"
    with pytest.raises(UnsupportedError, match=r"moeinf\.load"):
        logits_of(model, random_prompt(0, 1, 3))

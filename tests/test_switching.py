"""Routers are called as their blocks call them; another implementation is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import COMMON, FAMILIES, OWN_GATES, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.blocks import try_router
from moeinf.integrations.transformers.lookahead import GateLookahead

OLD = transformers.__version__.startswith("5.0.")
KNOWN = [family for family in FAMILIES | OWN_GATES if family in CONFIG_MAPPING]


def blocks_of(model: Any) -> list[Any]:
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if hasattr(module, "_apply_gate")]
    return [modules[name.rpartition(".")[0]] for name in names]


def random_hidden(seed: int, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, COMMON["hidden_size"], generator=generator)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("family", KNOWN)
def test_a_router_called_alone_chooses_as_in_its_block(
    family: str, tmp_path: Path, seed: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, family, seed=seed))
    if family == "deepseek_v2" and OLD:  # its block does not call its router
        with pytest.raises(UnsupportedError, match="DeepseekV2Moe: its router cannot be called"):
            try_router(blocks_of(model)[0])
        return
    hidden, ids = random_hidden(seed), torch.arange(7, 12)[None]
    seen: list[torch.Tensor] = []
    for block in blocks_of(model):
        router = try_router(block).router
        block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        with torch.no_grad():
            block(hidden, **({"input_ids": ids} if router.needs_ids else {}))
            assert torch.equal(router.choose(hidden, ids), seen.pop())


class Block(torch.nn.Module):
    """A MoE block around a router of the test's own."""

    def __init__(self, model: Any, route: Any):
        super().__init__()
        self.gate = torch.nn.Linear(COMMON["hidden_size"], 6, bias=False)
        self.experts = blocks_of(model)[0].experts
        self.register_buffer("bias", torch.randn(6))
        self.route = route

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.experts(*self.route(self, hidden))


def chosen(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.softmax(-1).topk(2)
    return ids, weights


def test_a_router_that_cannot_be_called_alone(qwen3_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder)

    def computed_argument(block: Block, hidden: torch.Tensor) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden, *chosen(block.gate(hidden + hidden.mean()))

    def own_choice(block: Block, hidden: torch.Tensor) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden, *chosen(block.gate(hidden) + block.bias)

    def fails(block: Block, hidden: torch.Tensor) -> Any:
        raise ValueError("no tokens")

    def never(block: Block, hidden: torch.Tensor) -> Any:
        return (hidden,)

    for route in (computed_argument, own_choice, fails):
        with pytest.raises(UnsupportedError, match=r"^Block: its router cannot be called alone"):
            try_router(Block(model, route))
    with pytest.raises(UnsupportedError, match=r"Linear: its router .* it has no experts"):
        GateLookahead([torch.nn.Linear(2, 2)], None)  # type: ignore[arg-type]
    never_called = Block(model, never)
    never_called.experts = torch.nn.Identity()
    never_called.experts.config = model.config
    with pytest.raises(UnsupportedError, match="Block: its router"):
        try_router(never_called)


@pytest.mark.skipif("deepseek_v4" not in CONFIG_MAPPING, reason="not in this transformers")
def test_experts_that_are_looked_up_by_token_are_predicted_exactly(
    tmp_path: Path, seed: int
) -> None:
    """DeepSeek-V4's hash layers: the token id says which experts come."""
    layers = ["hash_moe", "hash_moe", "moe"]
    write_checkpoint(tmp_path, "deepseek_v4", seed=seed, mlp_layer_types=layers)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for block in blocks_of(model)[:2]:
        block.gate.tid2eid.copy_(torch.rand(97, 6).argsort(-1)[:, :2])

    class Listener:
        wants_predictions, on_gpu = True, False

        def predict(self, layer: int, choices: torch.Tensor) -> None:
            predicted[layer] = choices.tolist()

    predicted: dict[int, Any] = {}
    lookahead = GateLookahead(blocks_of(model), Listener())  # type: ignore[arg-type]
    assert lookahead.needs_ids == [True, True, False]
    with torch.no_grad():
        for token in (3, 50, 96):
            model(torch.tensor([[token]]))
            assert predicted[1] == blocks_of(model)[1].gate.tid2eid[[token]].tolist()


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_another_implementation_is_refused_and_the_first_comes_back(
    name: str, qwen3_folder: Path, seed: int
) -> None:
    model = moeinf.load(qwen3_folder, slots=4)
    ids = torch.randint(0, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
    expected = logits_of(model, ids)
    model.set_experts_implementation(name)
    with pytest.raises(UnsupportedError, match=rf"served by moeinf .* found '{name}'"):
        logits_of(model, ids)
    model.config._experts_implementation = "moeinf"  # 5.0 takes names from a list of its own
    assert torch.equal(logits_of(model, ids), expected)


def test_a_configuration_that_names_the_implementation(
    qwen3_folder: Path, tmp_path: Path, seed: int
) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "experts_implementation": "moeinf"}))
    ids = torch.randint(0, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
    expected = logits_of(moeinf.load(qwen3_folder), ids)
    assert torch.equal(logits_of(moeinf.load(folder), ids), expected)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if OLD:  # does not read it
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(UnsupportedError, match=r"call moeinf\.load\(path\) in place of"):
        logits_of(model, ids)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_per_token_changed_after_loading(family: str, tmp_path: Path, seed: int) -> None:
    """As in transformers: a router keeps the number it was made with, until it is given another."""
    write_checkpoint(tmp_path, family, seed=seed)
    served = moeinf.load(tmp_path, slots=3)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ids = torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(seed))
    for top_k in (1, 3):
        for model in (served, reference):
            model.config.num_experts_per_tok = top_k
        torch.testing.assert_close(
            logits_of(served, ids), logits_of(reference, ids), rtol=1e-4, atol=1e-4
        )
        for model in (served, reference):
            for block in blocks_of(model):
                block.gate.top_k = block.top_k = top_k
        torch.testing.assert_close(
            logits_of(served, ids), logits_of(reference, ids), rtol=1e-4, atol=1e-4
        )


def test_two_models_in_one_process(qwen3_folder: Path, tmp_path: Path, seed: int) -> None:
    """One is loaded, used and released while the other goes on."""
    ids = torch.randint(0, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
    first = moeinf.load(qwen3_folder, slots=3)
    expected = logits_of(first, ids)
    second = moeinf.load(write_checkpoint(tmp_path, "mixtral", seed=seed), slots=2)
    assert logits_of(second, ids).shape == expected.shape
    assert torch.equal(logits_of(first, ids), expected)
    del second
    assert torch.equal(logits_of(first, ids), expected)


@pytest.mark.skipif(OLD, reason="5.0 takes names from a list of its own")
def test_a_caller_of_from_pretrained_is_sent_to_load(qwen3_folder: Path) -> None:
    config = AutoConfig.from_pretrained(qwen3_folder)
    model = AutoModelForCausalLM.from_pretrained(
        qwen3_folder, config=config, experts_implementation="moeinf"
    )
    with pytest.raises(UnsupportedError, match=r"call moeinf\.load\(path\) in place of"):
        logits_of(model, torch.tensor([[1, 2]]))

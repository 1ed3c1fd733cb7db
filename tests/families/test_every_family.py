"""Every family of the installed transformers whose experts use the interface is served, or is
listed here with the reason. A family of a newer version shows up by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from table import FILE, WHERE, first_line, generates_text, table, tried
from tiny import families, tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
from moeinf.integrations.transformers.experts import experts_modules, parameters_of
from moeinf.integrations.transformers.families import NOT_SERVED
from moeinf.integrations.transformers.models import model_class

Tensors = dict[str, torch.Tensor]
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
FOUND = list(tried())
TYPES = [(family, name) for family, name, _ in FOUND]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Handing such small products to threads takes longer than the products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, model_type: str, **options: Any) -> type:
    """A random checkpoint; returns the class that it is a model of."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type]
    base, part = model_class(config(**tiny(config)), WHERE)
    model: Any = base(part)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **options)
    return base


def logits_of(model: Any) -> torch.Tensor:
    torch.manual_seed(2)  # models of diffusion draw noise
    with torch.no_grad():
        output = model(input_ids=IDS)
    found: torch.Tensor = output["logits" if "logits" in output else "last_hidden_state"]
    return found


def tokens_of(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > IDS.shape[1]
    return tokens


def assert_served(folder: Path, base: Any) -> None:
    """Equal to transformers; to the bit with two slots and with all; and the experts matter."""
    reference = base.from_pretrained(folder, experts_implementation="eager", dtype=torch.float32)
    expected = logits_of(reference.eval())
    scale = expected.abs().max()
    served = moeinf.load(folder, device="cpu", dtype=torch.float32)
    found = logits_of(served)
    assert (found - expected).abs().max() <= 1e-4 * scale
    if generates_text(reference.config.model_type, base):
        assert torch.equal(tokens_of(served), tokens_of(reference))
    assert torch.equal(logits_of(moeinf.load(folder, device="cpu", slots=2)), found)
    for module in experts_modules(reference).values():
        for name in parameters_of(module):
            getattr(module, name).data.zero_()
    assert (logits_of(reference) - expected).abs().max() > 1e-3 * scale


def test_every_family_is_served_or_listed() -> None:
    served = {family for family, _ in TYPES}
    assert served.isdisjoint(NOT_SERVED)
    assert served <= {*families()}
    assert {*families()} - served <= {*NOT_SERVED}


def test_the_table_is_of_this_tree() -> None:
    """docs/families.md, where it was made with the installed transformers."""
    there = FILE.read_text("utf-8")
    if not there.startswith(first_line()):
        pytest.skip("docs/families.md was made with another version of transformers")
    assert there == table(FOUND), "docs/families.md is old: run `make families`"


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_a_family(family: str, model_type: str, tmp_path: Path) -> None:
    assert_served(tmp_path, write(tmp_path, model_type))


def _turn_experts(tensors: Tensors) -> Tensors:
    return {n: t.transpose(1, 2) if ".experts." in n else t for n, t in tensors.items()}


def _rename(before: str, after: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(before, after, 1): t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("model_type", "original", "change"),
    [
        ("qwen3_vl_moe", True, _turn_experts),
        ("qwen3_5_moe_text", False, _rename("model.", "model.language_model.")),
        ("qwen3_5_moe_text", True, _rename("model.", "model.language_model.")),
        ("deepseek_v4", True, _rename("model.", "")),
        ("mixtral", False, lambda tensors: tensors),
    ],
)
def test_names_of_the_hub(
    model_type: str, original: bool, change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    """Where save_pretrained writes other names or another order than the published files have."""
    base = write(tmp_path, model_type, save_original_format=original)
    path = tmp_path / "model.safetensors"
    tensors = {name: t.clone().contiguous() for name, t in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert_served(tmp_path, base)


def test_a_norm_behind_the_experts_leaves_tokens_as_they_are(tmp_path: Path) -> None:
    """Muse-Spark: each route is computed on its own, and a trace still has one row per token."""
    write(tmp_path, "muse_spark_text")
    model: Any = moeinf.load(tmp_path, device="cpu")
    with torch.no_grad(), model.moeinf.cache.record() as recorder:
        model(input_ids=IDS)
    assert recorder.trace().experts.shape == (IDS.numel(), model.moeinf.cache.store.num_layers, 2)


def test_a_route_to_no_expert_is_not_read(tmp_path: Path) -> None:
    """ZAYA's router names expert 0 with weight 0 where it skips."""
    write(tmp_path, "zaya")
    model: Any = moeinf.load(tmp_path, device="cpu")
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = 1e4
    logits_of(model)
    assert model.moeinf.stats()["accesses"] == 0

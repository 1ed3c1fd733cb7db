"""NaN and infinity go where transformers' eager model has them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeinf


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def run(model: Any, seed: int) -> torch.Tensor:
    """Logits of three rows, of which the middle one begins with a NaN."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, COMMON["vocab_size"], (3, 7), generator=make)
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        embedded[1, 0] = torch.nan
        return model(inputs_embeds=embedded).logits


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_row_of_nan_leaves_the_others_alone(
    family: str, device: str, tmp_path: Path, seed: int
) -> None:
    write_checkpoint(tmp_path, family, seed=seed)
    expected = run(AutoModelForCausalLM.from_pretrained(tmp_path), seed)
    assert expected[1].isnan().all()
    assert torch.isfinite(expected[[0, 2]]).all()
    for slots in (2, None):
        check(run(moeinf.load(tmp_path, device=device, slots=slots), seed), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_of_an_expert_that_is_not_finite(
    value: float, device: str, tmp_path: Path, seed: int
) -> None:
    """The tokens that are routed to it, and those that attend to them, as in the reference."""
    write_checkpoint(tmp_path, seed=seed)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][5, 7] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    # For some tokens, every one is routed to that expert.
    answers = ((drawn, run(reference, drawn)) for drawn in range(seed, seed + 50))
    drawn, expected = next(x for x in answers if torch.isfinite(x[1][[0, 2]]).any())
    check(run(moeinf.load(tmp_path, device=device, slots=2), drawn), expected)

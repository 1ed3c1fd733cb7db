"""The cache on the CUDA driver of this machine: a real GPU, where there is one.

A short form of test_cuda_cache.py on the device itself, part of benchmarks/gpu_session.sh. Set
MOEINF_CUDA_DRIVER to the fake driver to try these tests without a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from transformers import PreTrainedModel

import moeinf

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or "MOEINF_CUDA_DRIVER" in os.environ), reason="no GPU is here"
)
TOTAL = 18  # experts of the checkpoint: 3 layers of 6


def prompt_of(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


def logits_of(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt.to(model.device)).logits.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_identical_to_the_bit_for_every_budget(
    dtype: torch.dtype, tmp_path: Path, seed: int
) -> None:
    write_checkpoint(tmp_path, seed=seed, dtype=dtype)
    prompts = [prompt_of(seed, 2, 11), prompt_of(seed, 3, 1), prompt_of(seed, 1, 1)]
    whole = moeinf.load(tmp_path, device="cuda", slots=TOTAL)
    expected = [logits_of(whole, prompt) for prompt in prompts]
    for slots in (1, 2, 5, 11):
        served = moeinf.load(tmp_path, device="cuda", slots=slots)
        for prompt, logits in zip(prompts * 2, expected * 2, strict=True):
            assert torch.equal(logits_of(served, prompt), logits), slots
        assert served.moeinf.stats()["host"]["copied_bytes"] > 0
    if dtype == torch.float32:
        on_cpu = logits_of(moeinf.load(tmp_path, device="cpu"), prompts[0])
        torch.testing.assert_close(expected[0], on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_bounded_ram_tier_and_a_resize_change_no_bit(
    qwen3_folder: Path, exclusive: bool, seed: int
) -> None:
    prompt = prompt_of(seed, 2, 7)
    expected = logits_of(moeinf.load(qwen3_folder, device="cuda", slots=TOTAL), prompt)
    served = moeinf.load(
        qwen3_folder, device="cuda", slots=4, host_memory="30%", exclusive=exclusive
    )
    for slots in (4, 12, 1, TOTAL, 2):
        served.moeinf.cache.resize(slots)
        assert torch.equal(logits_of(served, prompt), expected), slots


def test_generation_gives_the_same_tokens(qwen3_folder: Path, seed: int) -> None:
    whole = moeinf.load(qwen3_folder, device="cuda")
    served = moeinf.load(qwen3_folder, device="cuda", memory="25%", prefetch="transition")
    prompt = prompt_of(seed, 2, 5).to(whole.device)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(served.generate(prompt, **options), whole.generate(prompt, **options))


def test_a_lease_holds_the_bytes_when_it_is_given(qwen3_folder: Path) -> None:
    store = moeinf.ExpertStore.open(qwen3_folder)
    cache = moeinf.ExpertCache(store, device="cuda", slots=3)
    for layer in range(3):
        with cache.acquire(layer, [4, 1]) as lease:
            found = cache.views()["down"][lease.slots[0]].cpu()
        assert torch.equal(found, store.read(layer, 4)["down"])

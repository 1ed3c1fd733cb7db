"""Slots in GPU memory, as Python sees them, on a driver made for tests.

Promised: the same bits for every budget and every content of the RAM tier, a resize at any time,
and errors that name what is missing.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library
from transformers import PreTrainedModel

import moeinf
from moeinf.errors import CapacityError, UnsupportedError
from moeinf.experts.op import backend_of

ROOT = Path(__file__).parent.parent
TOTAL = 18  # experts of the checkpoint: 3 layers of 6


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def random_prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


def logits_of(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_identical_to_the_bit_for_every_budget(
    dtype: torch.dtype, tmp_path: Path, seed: int
) -> None:
    write_checkpoint(tmp_path, seed=seed, dtype=dtype)
    prompts = [random_prompt(seed, 2, 11), random_prompt(seed, 3, 1)]
    whole = moeinf.load(tmp_path, device="cuda", slots=TOTAL)
    expected = [logits_of(whole, prompt) for prompt in prompts]
    for slots in (1, 2, 3, 5, 11):
        served = moeinf.load(tmp_path, device="cuda", slots=slots)
        for _ in range(2):
            for prompt, logits in zip(prompts, expected, strict=True):
                assert torch.equal(logits_of(served, prompt), logits), slots
        stats = served.moeinf.stats()
        assert stats["device"].startswith("cuda:0")
        assert stats["host"]["copied_bytes"] > 0
    if dtype == torch.float32:
        on_cpu = logits_of(moeinf.load(tmp_path, device="cpu"), prompts[0])
        torch.testing.assert_close(expected[0], on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is what it starts")
def test_the_triton_kernels_compute_there_too() -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "budget"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("host_memory", ["6%", "30%", "100%"])
def test_a_bounded_ram_tier_changes_no_bit(
    qwen3_folder: Path, host_memory: str, exclusive: bool, seed: int
) -> None:
    prompt = random_prompt(seed, 2, 7)
    expected = logits_of(moeinf.load(qwen3_folder, device="cuda", slots=TOTAL), prompt)
    served = moeinf.load(
        qwen3_folder, device="cuda", slots=4, host_memory=host_memory, exclusive=exclusive
    )
    for _ in range(3):
        assert torch.equal(logits_of(served, prompt), expected)
    host = served.moeinf.stats()["host"]
    assert host["slots"] <= TOTAL
    assert host["read_bytes"] > 0
    in_ram = moeinf.load(qwen3_folder, slots=4)
    for _ in range(3):
        logits_of(in_ram, prompt)
    assert served.moeinf.stats()["hits"] == in_ram.moeinf.stats()["hits"]
    if exclusive and host_memory == "30%":
        assert host["demoted"] > 0


def test_a_resize_in_the_middle(qwen3_folder: Path, seed: int) -> None:
    prompt = random_prompt(seed, 2, 7)
    expected = logits_of(moeinf.load(qwen3_folder, device="cuda", slots=TOTAL), prompt)
    served = moeinf.load(qwen3_folder, device="cuda", slots=3)
    for slots in (3, 12, 1, TOTAL, 2):
        served.moeinf.cache.resize(slots)
        assert served.moeinf.cache.slots == slots
        assert torch.equal(logits_of(served, prompt), expected)


def test_generation_gives_the_same_tokens(qwen3_folder: Path, seed: int) -> None:
    prompt = random_prompt(seed, 2, 5)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = moeinf.load(qwen3_folder, device="cuda")  # "auto": all of so few fit
    assert whole.moeinf.cache.slots == TOTAL
    served = moeinf.load(qwen3_folder, device="cuda", memory="25%")
    assert torch.equal(served.generate(prompt, **arguments), whole.generate(prompt, **arguments))


def test_choices_are_handed_over_with_the_ids_of_the_next_step(qwen3_folder: Path) -> None:
    """The host waits for those ids already, so the choices cost no wait of their own."""
    store = moeinf.ExpertStore.open(qwen3_folder)
    cache = moeinf.ExpertCache(store, device="cuda", slots=5, prefetch="external")
    hidden, weights = torch.ones(1, 40), torch.ones(1, 1)
    choices = torch.tensor([[2]])

    def step(layer: int) -> None:
        moeinf.fused_experts(hidden, torch.tensor([[2]]), weights, cache, layer)

    step(0)
    cache.predict(2, choices)
    choices[0, 0] = 4  # what the router will write next is not what was predicted
    assert cache.stats()["prefetch"]["predicted"] == 0
    step(1)
    step(2)
    prefetch = cache.stats()["prefetch"]
    assert (prefetch["predicted"], prefetch["correct"]) == (1, 1)


def test_the_gate_predicts_there_as_on_the_cpu(qwen3_folder: Path) -> None:
    prompt = random_prompt(1, 1, 5)  # one whose tokens vary: recall is by chance of the prompt
    arguments: dict[str, Any] = {
        "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    expected = moeinf.load(qwen3_folder, device="cuda").generate(prompt, **arguments)
    served = moeinf.load(qwen3_folder, device="cuda", slots=5, prefetch="gate")
    assert torch.equal(served.generate(prompt, **arguments), expected)
    prefetch = served.moeinf.stats()["prefetch"]
    assert prefetch["steps"] >= 16
    assert prefetch["recall"] > 0.4  # chance: 2 of 6


def test_a_recorder_gets_its_ids_from_the_step(qwen3_folder: Path, seed: int) -> None:
    traces = []
    for device in ("cpu", "cuda"):
        model = moeinf.load(qwen3_folder, device=device, slots=4)
        with model.moeinf.cache.record() as recorder:
            logits_of(model, random_prompt(seed, 1, 6))
        traces.append(recorder.trace())
    assert (traces[0].experts == traces[1].experts).all()


def test_padding_is_not_recorded_there_either(qwen3_folder: Path, seed: int) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    model: Any = moeinf.load(qwen3_folder, device="cuda", slots=4)
    with model.moeinf.cache.record(router=True) as recorder:
        model.generate(
            random_prompt(seed, 2, 6), attention_mask=mask, max_new_tokens=3, do_sample=False
        )
        model(random_prompt(seed, 1, 2))  # with autograd on
    trace = recorder.trace()
    assert trace.sequence.tolist() == [0] * 4 + [1] * 8 + [2] * 2
    assert trace.phase.tolist() == [0] * 2 + [1] * 2 + [0] * 6 + [1] * 2 + [0] * 2
    assert trace.router is not None and trace.router.shape == (14, 3, 6)


def test_ids_that_no_expert_has_and_tokens_without_any(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, device="cuda", slots=2)
    hidden, weights = torch.ones(2, 40), torch.ones(2, 1)
    none = moeinf.fused_experts(hidden, torch.full((2, 1), -1), weights, cache, 0)
    assert torch.equal(none, torch.zeros(2, 40))
    assert moeinf.fused_experts(
        hidden[:0], torch.zeros(0, 1, dtype=torch.int64), weights[:0], cache, 0
    ).shape == (0, 40)
    good = moeinf.fused_experts(hidden, torch.full((2, 1), 5), weights, cache, 0)
    assert torch.isfinite(good).all()


def test_tokens_that_are_routed_to_no_expert(store: moeinf.ExpertStore) -> None:
    """No columns of ids, or no experts in them; the output is contiguous for strided tokens too."""
    cache = moeinf.ExpertCache(store, device="cuda", slots=4)
    hidden = torch.randn(COMMON["hidden_size"], 5).t()
    for ids in (torch.ones(5, 0, dtype=torch.int64), torch.full((5, 2), -1)):
        out = moeinf.fused_experts(hidden, ids, torch.ones(ids.shape), cache, 0)
        assert torch.equal(out, torch.zeros(5, COMMON["hidden_size"]))
        assert out.is_contiguous()


def test_tensors_elsewhere(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, device="cuda", slots=2)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"hidden: expected a tensor on cpu.*found meta"):
        backend_of(cache.name).run(torch.ones(1, 40, device="meta"), ids, weights, 0)


def test_a_device_that_is_not_there(store: moeinf.ExpertStore) -> None:
    with pytest.raises(ValueError, match="99"):
        moeinf.ExpertCache(store, device="cuda:99", slots=2)
    with pytest.raises(ValueError, match="expected cpu, cuda"):
        moeinf.ExpertCache(store, device="toaster", slots=2)
    with pytest.raises(UnsupportedError, match="cpu or a cuda device"):
        moeinf.ExpertCache(store, device="meta", slots=2)


def test_budgets_that_cannot_work(store: moeinf.ExpertStore) -> None:
    with pytest.raises(CapacityError, match="below one slot"):
        moeinf.ExpertCache(store, device="cuda", memory=1000)
    with pytest.raises(CapacityError, match=r"host_memory.*below one slot"):
        moeinf.ExpertCache(store, device="cuda", slots=2, host_memory=1000)
    with pytest.raises(ValueError, match="how experts reach a GPU"):
        moeinf.ExpertCache(store, slots=2, host_memory="1GiB")


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_no_driver(qwen3_folder: Path, tmp_path: Path) -> None:
    script = f"import moeinf; moeinf.load({str(qwen3_folder)!r}, device='cuda')"
    run = python(script, MOEINF_CUDA_DRIVER=str(tmp_path / "libnone.so"))
    assert run.returncode != 0
    assert "UnsupportedError" in run.stderr and "libnone.so" in run.stderr


@pytest.mark.parametrize("benchmark", ["decode_gpu", "copy_gpu", "host_time"])
def test_the_benchmarks_run_to_their_end(benchmark: str, tmp_path: Path) -> None:
    tokens = {"decode_gpu": ["--tokens", "4"], "copy_gpu": ["--steps", "5"]}.get(benchmark, [])
    output = tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--tiny", "--json", output, *tokens],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert '"rows"' in output.read_text()


def test_an_interpreter_that_exits_with_copies_in_flight(qwen3_folder: Path) -> None:
    program = """
import ctypes, os, sys
import moeinf
cache = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[1]), device="cuda", slots=18)
fake = ctypes.CDLL(os.environ["MOEINF_CUDA_DRIVER"])
fake.fake_cuda_set_link(0, ctypes.c_double(1e5), ctypes.c_uint64(0))
assert cache.prefetch(0, range(6)) == 6
"""
    subprocess.run([sys.executable, "-c", program, str(qwen3_folder)], check=True, timeout=60)


def test_a_lease_holds_the_bytes_when_it_is_given(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, device="cuda", slots=3)
    fake = ctypes.CDLL(str(fake_cuda_library()))
    fake.fake_cuda_set_link(0, ctypes.c_double(1e6), ctypes.c_uint64(0))  # tens of milliseconds
    try:
        for layer in range(3):
            wanted = store.read(layer, 4)["down"]
            with cache.acquire(layer, [4, 1]) as lease:
                assert torch.equal(cache.views()["down"][lease.slots[0]], wanted)
            for wave in cache.waves(layer, range(6)):
                for expert, slot in zip(wave.experts, wave.slots, strict=True):
                    found = cache.views()["down"][slot]
                    assert torch.equal(found, store.read(layer, expert)["down"])
    finally:
        fake.fake_cuda_reset(ctypes.c_uint64(1))

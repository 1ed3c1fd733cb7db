"""Several GPUs over one RAM tier, as Python sees them, on a driver made for tests.

Promised: output identical to the bit to that of one GPU, an expert read and pinned once for all,
and errors for maps and tiers that cannot be served.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library

import moeinf
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers import device_map as maps

LAYERS, TOTAL = 3, 18  # of the checkpoint; 6 experts in each layer
SPLIT = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": "cuda:1",
    "model.layers.2": torch.device("cuda:1"),
    "model.norm": 1,
    "lm_head": 1,
}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """A driver of two GPUs."""
    monkeypatch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    library = ctypes.CDLL(str(fake_cuda_library()))
    library.fake_cuda_device_bytes.restype = ctypes.c_uint64
    library.fake_cuda_registered_bytes.restype = ctypes.c_uint64
    library.fake_cuda_reset(ctypes.c_uint64(1))
    library.fake_cuda_set_device_count(2)
    yield library
    gc.collect()  # what a failed or cyclic test left on the second GPU
    library.fake_cuda_reset(ctypes.c_uint64(1))


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


def random_prompt(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], (2, 9), generator=generator)


def logits_of(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_gpus_give_the_bits_of_one(
    dtype: torch.dtype, tmp_path: Path, seed: int, fake: ctypes.CDLL
) -> None:
    write_checkpoint(tmp_path, seed=seed, dtype=dtype)
    prompt = random_prompt(seed)
    expected = logits_of(moeinf.load(tmp_path, device="cuda", slots=TOTAL), prompt)
    fake.fake_cuda_reset(ctypes.c_uint64(1))
    fake.fake_cuda_set_device_count(2)
    for options in ({"slots": 2}, {"slots": 6}, {"slots": 3, "exclusive": True}):
        served = moeinf.load(tmp_path, device_map=SPLIT, **options)
        for _ in range(3):
            assert torch.equal(logits_of(served, prompt), expected), options
        stats = served.moeinf.stats()
        assert stats["slots"] == 2 * options["slots"]
        assert "cuda:0" in stats["device"] and "cuda:1" in stats["device"]
        assert stats["accesses"] == sum(one["accesses"] for one in stats["devices"].values())
        assert stats["devices"]["cuda:0"]["layers"][1]["accesses"] == 0
        assert stats["devices"]["cuda:1"]["layers"][0]["accesses"] == 0
        moved = [fake.fake_cuda_device_bytes(index, 0) for index in range(2)]
        assert all(moved) and sum(moved) >= stats["host"]["copied_bytes"] > 0
    if dtype == torch.float32:
        on_cpu = logits_of(moeinf.load(tmp_path, device="cpu"), prompt)
        torch.testing.assert_close(expected, on_cpu, rtol=1e-4, atol=1e-4)


def test_each_expert_is_read_and_pinned_once(store: moeinf.ExpertStore, fake: ctypes.CDLL) -> None:
    tier = moeinf.HostTier(store)
    pinned = fake.fake_cuda_registered_bytes()
    caches = [moeinf.ExpertCache(store, device=f"cuda:{i}", tier=tier, slots=4) for i in range(2)]
    assert fake.fake_cuda_registered_bytes() == pinned
    experts = list(range(store.num_experts))
    for cache in caches:
        for layer in range(LAYERS):
            for lease in cache.waves(layer, experts):
                with lease:
                    for expert, slot in zip(lease.experts, lease.slots, strict=True):
                        for name, view in cache.views().items():
                            assert torch.equal(view[slot], read(store, layer, expert)[name])
    counts = tier.stats()
    assert counts["read_bytes"] == TOTAL * sum(s.nbytes for s in store.layout.segments)
    assert counts["hits"] + counts["misses"] >= 2 * TOTAL
    tier.reset_stats()
    assert caches[0].stats()["host"]["hits"] == 0


def read(store: moeinf.ExpertStore, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """What a cache of its own in RAM finds in the files."""
    cache = moeinf.ExpertCache(store, slots=1)
    with cache.acquire(layer, [expert]) as lease:
        return {name: view[lease.slots[0]].clone() for name, view in cache.views().items()}


def test_a_tier_outlives_its_owner_and_its_caches(
    store: moeinf.ExpertStore, fake: ctypes.CDLL
) -> None:
    tier = moeinf.HostTier(store, memory="50%", exclusive=True)
    first = moeinf.ExpertCache(store, device="cuda:0", tier=tier, slots=2)
    second = moeinf.ExpertCache(store, device="cuda:1", tier=tier, slots=2)
    del tier
    gc.collect()
    first.prefetch(0, [0, 1])
    del first
    gc.collect()
    for layer in range(LAYERS):
        for lease in second.waves(layer, list(range(store.num_experts))):
            lease.release()
    assert fake.fake_cuda_registered_bytes() > 0
    del second, lease
    gc.collect()
    assert fake.fake_cuda_registered_bytes() == 0


def test_tiers_that_cannot_serve(store: moeinf.ExpertStore, tmp_path: Path) -> None:
    tier = moeinf.HostTier(store)
    write_checkpoint(tmp_path, seed=5, dtype=torch.float32)
    other = moeinf.ExpertStore.open(tmp_path)
    with pytest.raises(ValueError, match=f"different stores.*{tmp_path}"):
        moeinf.ExpertCache(other, device="cuda:1", tier=tier)
    with pytest.raises(ValueError, match="give device"):
        moeinf.ExpertCache(store, tier=tier)
    with pytest.raises(ValueError, match="the tier's own"):
        moeinf.ExpertCache(store, device="cuda:1", tier=tier, host_memory="50%")
    with pytest.raises(ValueError, match="serves GPUs"):
        moeinf.HostTier(store, device="cpu")
    with pytest.raises(ValueError, match="device for each of 3"):
        moeinf.CacheGroup(store, ["cuda:0"])
    with pytest.raises(UnsupportedError, match="layer 1 lies on 'cpu'"):
        moeinf.CacheGroup(store, ["cuda:0", "cpu", "cuda:1"])


def without(path: str) -> dict[str, Any]:
    return {name: device for name, device in SPLIT.items() if name != path}


@pytest.mark.parametrize(
    ("device_map", "error", "words"),
    [
        (SPLIT | {"lm_head": 2}, ValueError, "lm_head.*0 to 1, found 2"),
        (SPLIT | {"lm_head": "cuda:7"}, ValueError, "lm_head.*found 7"),
        (SPLIT | {"lm_head": "gpu"}, ValueError, "lm_head.*expected cpu, cuda or cuda:N"),
        (SPLIT | {"lm_head": None}, ValueError, "device for 'lm_head', found None"),
        (SPLIT | {"lm_head": True}, ValueError, "device for 'lm_head', found True"),
        (SPLIT | {3: 0}, ValueError, "module path, found 3"),
        (SPLIT | {"model.layerz.1": 1}, ValueError, "module of the model, found 'model.layerz.1'"),
        (SPLIT | {"model.layers.3": 1}, ValueError, "module of the model, found 'model.layers.3'"),
        (SPLIT | {"lm_head": "meta"}, UnsupportedError, "lm_head.*meta"),
        (SPLIT | {"lm_head": "disk"}, UnsupportedError, "lm_head.*disk"),
        (SPLIT | {"model.layers.2": "cpu"}, UnsupportedError, "layer 2 lies on 'cpu'"),
        (without("model.layers.1"), ValueError, "model.layers.1.*found none"),
        (without("model.rotary_emb"), ValueError, "model.rotary_emb.*found none"),
        (without("model.norm"), ValueError, "model.norm.*found none"),
        ({}, ValueError, "expected 'auto', or module paths"),
        ([0, 1], ValueError, "expected 'auto', or module paths"),
        ("balanced", ValueError, "expected 'auto' or a map"),
    ],
)
def test_maps_that_cannot_be_served(
    device_map: Any, error: type[Exception], words: str, qwen3_folder: Path
) -> None:
    with pytest.raises(error, match=words):
        moeinf.load(qwen3_folder, device_map=device_map)


def test_options_of_one_device(qwen3_folder: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        moeinf.load(qwen3_folder, device="cuda:0", device_map=SPLIT)
    with pytest.raises(UnsupportedError, match="give one device"):
        moeinf.load(qwen3_folder, device_map=SPLIT, prefetch="gate")
    with pytest.raises(UnsupportedError, match="priors"):
        moeinf.load(qwen3_folder, device_map=SPLIT, priors=object())


def test_a_map_of_one_device_is_that_device(qwen3_folder: Path, seed: int) -> None:
    prompt = random_prompt(seed)
    served = moeinf.load(qwen3_folder, device_map={"": "cuda:1"}, slots=4)
    assert isinstance(served.moeinf.cache, moeinf.ExpertCache)
    assert served.moeinf.stats()["device"].startswith("cuda:1")
    one = moeinf.load(qwen3_folder, device="cuda:0", slots=4)
    assert torch.equal(logits_of(served, prompt), logits_of(one, prompt))
    on_cpu = moeinf.load(qwen3_folder, device_map={"": "cpu"})
    assert on_cpu.moeinf.stats()["device"] == "cpu"


def test_auto_divides_layers_by_free_memory(
    qwen3_folder: Path, seed: int, fake: ctypes.CDLL
) -> None:
    gib = 2**30
    for device, nbytes in ((0, 2 * gib), (1, gib)):
        fake.fake_cuda_set_device_memory(device, ctypes.c_uint64(nbytes))
    served = moeinf.load(qwen3_folder, device_map="auto", slots=4)
    assert served.moeinf.cache.devices == ["cuda:0", "cuda:0", "cuda:1"]
    prompt = random_prompt(seed)
    one = moeinf.load(qwen3_folder, device="cuda:0", slots=4)
    assert torch.equal(logits_of(served, prompt), logits_of(one, prompt))
    experts = [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
    for free, expected in (((1, 1), "011"), ((1, 9), "111"), ((9, 1), "000"), ((1, 2), "011")):
        named = {f"cuda:{i}": nbytes for i, nbytes in enumerate(free)}
        found = maps.balanced(served, experts, named)
        assert "".join(found[f"model.layers.{i}"][-1] for i in range(LAYERS)) == expected
        assert set(found) == set(SPLIT)
        assert found["model.embed_tokens"] == "cuda:0"
        assert found["lm_head"] == found[f"model.layers.{LAYERS - 1}"]


def test_recorded_routing_is_that_of_one_device(qwen3_folder: Path, seed: int) -> None:
    prompt = random_prompt(seed)
    traces = []
    for options in ({"device": "cuda:0"}, {"device_map": SPLIT}):
        served = moeinf.load(qwen3_folder, slots=4, **options)
        with served.moeinf.cache.record() as recorder:
            logits_of(served, prompt)
            logits_of(served, prompt)
        traces.append(recorder.trace(model="m", source="test"))
    assert (traces[0].experts == traces[1].experts).all()
    assert (traces[0].sequence == traces[1].sequence).all()
    assert (traces[0].phase == traces[1].phase).all()


def test_experts_may_lie_elsewhere_than_their_layer(qwen3_folder: Path, seed: int) -> None:
    """Also by the names of parameters, which a map made for the whole model may hold."""
    prompt = random_prompt(seed)
    expected = logits_of(moeinf.load(qwen3_folder, device="cuda:0", slots=4), prompt)
    for path in ("model.layers.1.mlp.experts", "model.layers.1.mlp"):
        served = moeinf.load(qwen3_folder, device_map={"": 0, path: 1}, slots=4)
        assert served.moeinf.cache.devices == ["cuda:0", "cuda:1", "cuda:0"]
        assert torch.equal(logits_of(served, prompt), expected)
    named = {"": 0, "model.layers.1": 1, "model.layers.1.mlp.experts.down_proj": 1}
    served = moeinf.load(qwen3_folder, device_map=named, slots=4)
    assert torch.equal(logits_of(served, prompt), expected)

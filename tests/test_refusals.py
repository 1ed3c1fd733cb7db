"""What cannot be loaded is refused in one sentence that names the file and the value."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

import moeinf
from moeinf.errors import CapacityError, CheckpointError, ReadError, UnsupportedError
from moeinf.experts.checks import MOST_ROUTES


@pytest.fixture
def folder(qwen3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 98}, r"(lm_head|embed_tokens)\.weight \(.* \[97, 40\]\): expected \[98,"),
        ({"dtype": "bogus"}, "config.json: dtype is 'bogus', which is no dtype of torch"),
        ({"rms_norm_eps": "1e-6"}, "config.json: .*'rms_norm_eps' expected float, got str"),
        ({"rope_scaling": {"type": "bogus"}}, r"config.json: .*\.type is 'bogus'"),
        ({"rope_parameters": {"rope_type": "bogus"}}, r"config.json: .*type is 'bogus'"),
        ({"model_type": []}, r"config.json: model_type is \[\], expected a name"),
        ({"model_type": None}, "config.json: model_type is None, expected a name"),
        ({"model_type": "no_such"}, "config.json: transformers refuses model_type 'no_such'"),
        ({"hidden_act": "SiLU"}, "config.json: .*SiLU"),
        ({"hidden_act": 7}, "config.json: .*hidden_act"),
        ({"num_experts_per_tok": 7}, "config.json: .*7 experts per token"),
        ({"num_hidden_layers": "3"}, "config.json: .*num_hidden_layers"),
    ],
)
def test_a_value_of_the_configuration_is_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        moeinf.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("method", ["fp_quant", "bitsandbytes", "hqq", "no_such", None])
@pytest.mark.parametrize("key", ["quantization_config", "text_config"])
def test_quantized_weights_are_refused_by_name(folder: Path, method: str, key: str) -> None:
    file = folder / "config.json"
    found: Any = {"quant_method": method, "bits": 4}
    if key == "text_config":
        found = {"quantization_config": found}
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: found}))
    (folder / "model.safetensors").write_bytes(b"not read")
    message = f"stored as {method!r}; supported are fp8, mxfp8, mxfp4, modelopt, compressed-tensors"
    with pytest.raises(UnsupportedError, match=message):
        moeinf.load(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": None}, "dtype=None: expected auto or one of bfloat16, float16, float32"),
        ({"dtype": "float64"}, "dtype='float64': expected auto"),
        ({"dtype": torch.float64}, r"dtype=torch\.float64: expected auto"),
        ({"policy": ""}, "no policy is named ''; there are: .*learned"),
        ({"prefetch": ""}, "no prefetch is named ''"),
        ({"slots": 0}, "slots=0: expected a count"),
    ],
)
def test_an_option_is_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moeinf.load(folder, **options)


def test_a_dtype_has_two_spellings(folder: Path) -> None:
    for dtype in ("float32", torch.float32):
        assert moeinf.load(folder, slots=2, dtype=dtype).dtype == torch.float32


def test_files_that_are_not_there_say_why(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"found a Git LFS pointer to it: .*git lfs pull"):
        moeinf.load(folder)
    weights.unlink()
    weights.symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a link to gone, which does"):
        moeinf.load(folder)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*expected a file, found a fo"):
        moeinf.load(folder)
    weights.rmdir()
    os.mkfifo(weights)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*expected a file"):
        moeinf.load(folder)
    weights.unlink()
    weights.write_bytes(raw)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: .*expected a file"):
        moeinf.load(folder)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_changes_between_opening_and_use(folder: Path, same_size: bool) -> None:
    """Replaced by another, or written to in place: the store refuses to read either."""
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    other = raw[:-1] + bytes([raw[-1] ^ 1]) if same_size else raw + b"\0"
    store = moeinf.ExpertStore.open(folder)
    (folder / "other").write_bytes(other)
    (folder / "other").replace(weights)
    with pytest.raises(ReadError, match=re.escape(str(weights))):
        moeinf.ExpertCache(store)
    with pytest.raises(ReadError, match="was replaced after the checkpoint was opened"):
        store.read(0, 0)
    store = moeinf.ExpertStore.open(folder) if same_size else store
    weights.write_bytes(raw)
    with pytest.raises(ReadError, match=re.escape(str(weights))):
        moeinf.ExpertCache(store)


def test_a_relative_path_is_that_of_the_folder_where_it_was_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    store = moeinf.ExpertStore.open(".")
    monkeypatch.chdir("/")
    with moeinf.ExpertCache(store, slots=2).acquire(0, [0]) as lease:
        assert lease.slots
    assert store.read(0, 0)


def test_dense_weights_count_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for all experts or for the rest of the model, but not for both."""
    from moeinf import _core
    from moeinf.cli.info import describe

    store = moeinf.ExpertStore.open(folder)
    every = (18 + _core.ExpertCache.staging_slots) * store.slot_bytes
    monkeypatch.setattr(_core, "available_memory", lambda: every + 1000)
    moeinf.ExpertCache(store)
    with pytest.raises(CapacityError, match=r"18 slots and two .* other weights .* available"):
        moeinf.load(folder)
    auto = moeinf.load(folder, memory="auto").moeinf.cache
    assert 1 <= auto.slots < 18
    assert describe(store.checkpoint)["fits_share"] == auto.slots / 18
    monkeypatch.setattr(_core, "available_memory", lambda: 3 * store.slot_bytes)
    with pytest.raises(CapacityError):
        moeinf.load(folder, slots=1)


def test_two_caches_do_not_count_on_the_same_memory(folder: Path) -> None:
    """What one has but never used so far is not available to the other."""
    from moeinf import _core

    before = _core.promised_memory()
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(folder))
    held = (18 + _core.ExpertCache.staging_slots) * cache.store.slot_bytes
    promised = _core.promised_memory() - before  # slots, and buffers of the file reader
    assert promised >= held
    for layer in range(3):
        for lease in cache.waves(layer, range(6)):
            lease.release()
    used = promised - (_core.promised_memory() - before)
    assert used >= 18 * cache.store.slot_bytes
    del cache, lease
    assert _core.promised_memory() == before


@pytest.mark.parametrize("options", [{}, {"prefetch": "gate"}])
def test_a_model_gives_its_memory_back_when_it_is_no_longer_used(
    folder: Path, options: dict[str, Any]
) -> None:
    """Without the garbage collector: nothing in it refers to itself."""
    gc.collect()
    gc.disable()
    try:
        model = moeinf.load(folder, slots=4, **options)
        ids = torch.tensor([[1, 2, 3]])
        with model.moeinf.cache.record(router=True):
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        cache = weakref.ref(model.moeinf.cache)
        del model
        assert cache() is None
    finally:
        gc.enable()


def test_more_routes_than_the_kernels_take_are_refused_at_load(tmp_path: Path) -> None:
    most = MOST_ROUTES["cpu"]
    write_checkpoint(tmp_path, num_experts=70, num_experts_per_tok=most + 1)
    with pytest.raises(UnsupportedError, match=f"config.json: {most + 1} experts per token"):
        moeinf.load(tmp_path)
    store = moeinf.ExpertStore.open(tmp_path)
    cache = moeinf.ExpertCache(store)
    hidden = torch.randn(1, store.layout.hidden)
    for routes in (most, most + 1):
        ids, weights = torch.arange(routes)[None], torch.full((1, routes), 0.1)
        if routes > most:
            with pytest.raises(ValueError, match="top_k may be at most"):
                moeinf.fused_experts(hidden, ids, weights, cache, 0)
        else:
            assert moeinf.fused_experts(hidden, ids, weights, cache, 0).isfinite().all()


def test_the_limit_of_routes_on_a_gpu_is_that_of_its_kernels() -> None:
    from moeinf.kernels.checks import MAX_TOP_K

    assert MOST_ROUTES["cuda"] == MAX_TOP_K

"""`moeinf.pack(format="bf16-palette")`: all bits of bf16 in 12, read by moeinf alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from test_pack import bytes_of, logits, same, tensors_of
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.packing.pack import STATE

SIZES = {"hidden_size": 64, "moe_intermediate_size": 128, "num_hidden_layers": 3}
PALETTE = "bf16-palette"


def change(folder: Path, changes) -> None:
    """Writes the tensors again, each as `changes(name, tensor)` leaves it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            changes(name, tensor)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def source(tmp_path: Path, seed: int) -> Path:
    """Weights with zeros, subnormal numbers, and up to five rare ones in a row of down."""
    folder = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **SIZES)

    def some(name: str, tensor: torch.Tensor) -> None:
        if ".experts." in name:
            tensor[0, :3] = torch.tensor([0.0, -0.0, 1e-40])
        if "down_proj" in name and ".experts.1." in name:
            tensor[5, :5] = torch.tensor([1e-20, -1e-25, 1e-30, 3e-12, 1e-40])

    change(folder, some)
    return folder


@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
def test_a_pack_has_the_logits_of_its_source(
    original_names: bool, tmp_path: Path, seed: int
) -> None:
    source = write_checkpoint(
        tmp_path / "a", seed=seed, dtype=torch.bfloat16, original_names=original_names, **SIZES
    )
    report = moeinf.pack(source, tmp_path / "b", format=PALETTE, max_shard_size="300KB")
    assert report.one_read and not report.errors and report.bytes < report.source_bytes
    expected = logits(moeinf.load(source, slots=5))
    for slots in (2, 12):
        assert torch.equal(logits(moeinf.load(tmp_path / "b", slots=slots)), expected)
    assert torch.equal(
        logits(moeinf.load(tmp_path / "b", slots=3, dtype=torch.float32)),
        logits(moeinf.load(source, slots=3, dtype=torch.float32)),
    )


def test_a_pack_in_bf16_again_has_the_tensors_of_the_source(source: Path, tmp_path: Path) -> None:
    moeinf.pack(source, tmp_path / "b", format=PALETTE)
    assert not same(tensors_of(tmp_path / "b"), tensors_of(source))
    moeinf.pack(tmp_path / "b", tmp_path / "c", format="bf16")
    assert same(tensors_of(tmp_path / "c"), tensors_of(source))
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("a", "c")]
    assert configs[0] == configs[1]
    moeinf.pack(tmp_path / "b", tmp_path / "d")
    assert same(tensors_of(tmp_path / "d"), tensors_of(tmp_path / "b"))
    with pytest.raises(UnsupportedError, match="is in this format already"):
        moeinf.pack(tmp_path / "b", tmp_path / "e", format=PALETTE)
    with pytest.raises(UnsupportedError, match="is quantised already"):
        moeinf.pack(tmp_path / "b", tmp_path / "e", format="fp8")


def test_all_layers_take_the_row_that_the_worst_one_needs(source: Path, tmp_path: Path) -> None:
    report = moeinf.pack(source, tmp_path / "b", format=PALETTE)
    assert report.weights == {
        "gate": "palette3 in 3 layers",
        "up": "palette3 in 3 layers",
        "down": "palette7 in 3 layers",
    }
    (cache,) = moeinf.load(tmp_path / "b", slots=2).moeinf.caches
    assert cache.store.layout.format_names == "palette3, palette7"
    stated = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert stated == {
        "format": PALETTE, "weights": ["palette3", "palette7"],
    }  # fmt: skip


def test_a_matrix_that_no_row_holds_stays_bf16_in_its_layer(source: Path, tmp_path: Path) -> None:
    def wild(name: str, tensor: torch.Tensor) -> None:
        if "layers.1.mlp.experts.2.up_proj" in name:
            tensor[7] = torch.exp2(torch.arange(64) - 40.0)

    change(source, wild)
    report = moeinf.pack(source, tmp_path / "b", format=PALETTE)
    of_gate = "palette3 in 2 layers, bf16 in 1 layers"
    assert report.weights == {"gate": of_gate, "up": of_gate, "down": "palette7 in 3 layers"}
    models = [moeinf.load(tmp_path / one, slots=3) for one in ("a", "b")]
    assert torch.equal(*map(logits, models))


def test_columns_that_are_no_whole_blocks_stay_bf16(tmp_path: Path, seed: int) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    report = moeinf.pack(source, tmp_path / "b", format=PALETTE)
    assert report.weights["down"].startswith("bf16 in")
    assert report.weights["gate"].startswith("palette")
    models = [moeinf.load(tmp_path / one, slots=3) for one in ("a", "b")]
    assert torch.equal(*map(logits, models))


def test_what_would_not_become_smaller_is_refused(source: Path, tmp_path: Path, seed: int) -> None:
    floats = write_checkpoint(tmp_path / "f", seed=seed, **SIZES)
    with pytest.raises(UnsupportedError, match=r"expected experts in bf16.*found f32"):
        moeinf.pack(floats, tmp_path / "b", format=PALETTE)

    def wild(name: str, tensor: torch.Tensor) -> None:
        if ".experts." in name:
            tensor[0] = torch.exp2(torch.arange(tensor.shape[1]) - 60.0)

    change(source, wild)
    with pytest.raises(UnsupportedError, match="no matrix becomes smaller"):
        moeinf.pack(source, tmp_path / "b", format=PALETTE)


def test_transformers_refuses_a_pack(source: Path, tmp_path: Path) -> None:
    moeinf.pack(source, tmp_path / "b", format=PALETTE)
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_an_interrupted_pack_goes_on(source: Path, tmp_path: Path) -> None:
    whole = moeinf.pack(source, tmp_path / "whole", format=PALETTE, max_shard_size="100KB")
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if total == whole.bytes and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeinf.pack(
            source, tmp_path / "half", format=PALETTE, max_shard_size="100KB", progress=stop
        )
    assert (tmp_path / "half" / STATE).exists()
    assert any(total > whole.bytes * 0.5 and done == total for done, total in seen[:-1])
    report = moeinf.pack(source, tmp_path / "half", format=PALETTE, max_shard_size="100KB")
    assert report.resumed_bytes > 0
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")


def test_a_tensor_of_another_size_is_refused(source: Path, tmp_path: Path) -> None:
    moeinf.pack(source, tmp_path / "b", format=PALETTE)
    (path,) = (tmp_path / "b").glob("*-00002-*.safetensors")
    good = load_file(path)
    name = next(name for name in good if name.endswith("weight_palette"))
    for bad in (good[name][:, :-1], good[name].to(torch.int8), good[name][:, -16:], good[name][0]):
        save_file({**good, name: bad.contiguous()}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}.*expected U8 rows of bf16 in 12 bits"):
            Checkpoint.open(tmp_path / "b")

"""`moeinf.pack`: the source to the bit, or each weight as the nearest number of a format."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packed_checkpoints import SIZES, STORED, quantised
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.formats import MULTIPLIER, SCALES, VALUES
from moeinf.checkpoint.packed_entry import PackedEntry
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CapacityError, CheckpointError, UnsupportedError
from moeinf.packing import linear, writer
from moeinf.packing.pack import STATE
from moeinf.packing.targets import TARGETS

ROUNDED = [name for name in TARGETS if name != "bf16"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return write_checkpoint(folder, "qwen3_moe", dtype=torch.bfloat16, **SIZES)


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not found.keys() & read.keys()
        found |= read
    return found


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype
        and torch.equal(found[n].contiguous().view(-1).view(torch.uint8),
                        t.contiguous().view(-1).view(torch.uint8))
        for n, t in expected.items()
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, COMMON["vocab_size"], (2, 9), generator=draw)
    with torch.no_grad():
        return model(tokens).logits


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# To the bit


@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_pack_is_the_source_to_the_bit_also_for_transformers(
    family: str, original_names: bool, tmp_path: Path, seed: int
) -> None:
    source = write_checkpoint(
        tmp_path / "a", family, seed=seed, dtype=torch.bfloat16, original_names=original_names,
        max_shard_size="60KB",
    )  # fmt: skip
    report = moeinf.pack(source, tmp_path / "b", max_shard_size="50KB")
    assert report.one_read == original_names and not report.errors
    assert same(tensors_of(tmp_path / "b"), tensors_of(source))
    ours = logits(moeinf.load(tmp_path / "b", slots=2))
    assert torch.equal(ours, logits(moeinf.load(source, slots=3)))
    theirs = [
        logits(AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager"))
        for folder in (source, tmp_path / "b")
    ]
    assert torch.equal(*theirs)


@pytest.mark.parametrize("name", STORED)
def test_experts_with_scales_are_packed_as_they_are(
    plain: Path, tmp_path: Path, seed: int, name: str
) -> None:
    source, _ = quantised(plain, tmp_path, name, seed)
    report = moeinf.pack(source, tmp_path / "pack")
    assert same(tensors_of(tmp_path / "pack"), tensors_of(source))
    assert report.one_read
    ours = [logits(moeinf.load(folder, slots=3)) for folder in (source, tmp_path / "pack")]
    assert torch.equal(*ours)


def test_a_pack_can_be_packed_again(plain: Path, tmp_path: Path) -> None:
    moeinf.pack(plain, tmp_path / "a")
    moeinf.pack(tmp_path / "a", tmp_path / "b", format="bf16")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_experts_of_whole_pages_lie_at_pages_in_the_order_of_slots(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    source = write_checkpoint(tmp_path / "a", dtype=torch.bfloat16, **sizes)
    moeinf.pack(source, tmp_path / "b")
    store = ExpertStore.open(tmp_path / "b")
    begins = []
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            extents = store.extents(layer, expert)
            begins.append(extents[0].file_offset)
            for extent in extents:  # as far from the first in the file as in the slot
                assert extent.file_offset - begins[-1] == extent.slot_offset
    assert all(begin % 4096 == 0 for begin in begins)
    assert {after - one for one, after in pairwise(begins)} == {24576}


def test_the_other_files_come_too_and_old_weights_do_not(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", ".hidden"):
        (source / name).write_text("x")
    moeinf.pack(source, tmp_path / "pack")
    found = {path.name for path in (tmp_path / "pack").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= found
    assert not found & {"pytorch_model.bin", ".hidden", STATE}
    assert bytes_of(source)["config.json"] == bytes_of(tmp_path / "pack")["config.json"]


# Rounded: a slow reference, which knows nothing of the program's own rounding

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [float(code) for code in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)]
# Numbers that a stored code can be, least first. An even place is an even code.
GRIDS = {
    "fp8": E4M3,
    "int8": [float(n) for n in range(128)],
    "int4": [float(n) for n in range(8)],
    "mxfp4": E2M1,
    "nvfp4": E2M1,
}
LOWEST = {"int8": -128.0, "int4": -8.0}  # has no positive counterpart


def nearest(number: float, name: str) -> float:
    """The number of the grid that is nearest, of two the one at an even place."""
    grid = GRIDS[name]
    size = min(range(len(grid)), key=lambda i: (abs(abs(number) - grid[i]), i % 2))
    best = grid[size] if number >= 0 else -grid[size]
    lowest = LOWEST.get(name)
    if lowest is not None and abs(number - lowest) <= abs(number - best):
        return lowest  # a tie of -7.5 goes to the even -8
    return best


def spread(scales: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(rows, cols, dtype=torch.float64)
    for i in range(rows):
        for j in range(cols):
            out[i, j] = scales[i // block[0], j // block[1]]
    return out


def e8m0(code: float) -> float:
    return 2.0 ** (code - 127)


@pytest.mark.parametrize("name", ROUNDED)
def test_every_weight_becomes_the_nearest_number(name: str, tmp_path: Path, seed: int) -> None:
    """Of a matrix with every size of number: zeros, a block of zeros, ties, tiny and huge ones."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    tensors = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    key = "model.layers.0.mlp.experts.1.{}_proj"
    for word in ("gate", "up", "down"):
        weight = tensors[key.format(word) + ".weight"]
        size = torch.exp2(torch.randint(-6, 1, weight.shape, generator=draw).double())
        weight.copy_(torch.randn(weight.shape, generator=draw) * size)
        weight[0], weight[1] = 0, torch.randint(-15, 16, weight[1].shape, generator=draw) / 2
        weight[2, :32] = 2.0**-100
        weight[3] *= 2.0**60 if name in ("int8", "int4", "mxfp4") else 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = moeinf.pack(source, tmp_path / "b", format=name)
    assert report.errors.keys() == {"model.layers.0.mlp.experts"}
    stored, layout = tensors_of(tmp_path / "b"), ExpertStore.open(tmp_path / "b").layout
    for word in ("gate", "up", "down"):
        row = layout.down.format if word == "down" else layout.gate.format
        assert row.block is not None
        weight = tensors[key.format(word) + ".weight"].double()
        rows, cols = weight.shape
        block = row.block[0], row.block[1] or cols
        ends = TARGETS[name].names
        kept = {piece: stored[key.format(word) + end] for piece, end in ends.items()}
        if TARGETS[name].words:
            kept[VALUES] = kept[VALUES].view(torch.uint8)
        scales = kept[SCALES].double()
        if name == "mxfp4":
            scales = torch.tensor([[e8m0(float(one)) for one in line] for line in scales])
        if MULTIPLIER in kept:
            divisor = kept[MULTIPLIER]
            kept[MULTIPLIER] = (1 / divisor.double()).float()
            scales = scales * kept[MULTIPLIER].double()
        assert (scales > 0).all() and scales.isfinite().all()
        wide = spread(scales, rows, cols, block)
        # A float32 quotient may fall on a tie that the exact one misses by its last bit.
        quotient = (weight.float() / wide.float()).double()
        expected = torch.tensor([[nearest(float(q), name) for q in line] for line in quotient])
        assert torch.equal(row.dequantise(kept), expected.double() * wide), word
        # No scale is larger than the numbers need, or so small that they are cut off.
        top = {"fp8": 448, "int8": 127.5, "int4": 7.5, "mxfp4": 6, "nvfp4": 6}[name]
        for part, scale in blocks(weight, block, scales):
            most = float(part.abs().max())
            if most > 1e-20 and name in ("fp8", "int8", "int4"):
                assert most / top == pytest.approx(scale, rel=2**-8)
            if most > 1e-20 and name == "mxfp4":
                assert 3.5 * scale <= most <= 7 * scale
            if most > 0.05 and name == "nvfp4":  # below, the steps of a small e4m3 scale are coarse
                assert most / top == pytest.approx(scale, rel=0.07)


def blocks(
    weight: torch.Tensor, block: tuple[int, int], scales: torch.Tensor
) -> Sequence[tuple[torch.Tensor, float]]:
    high, wide = block
    return [
        (weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide], float(scales[i, j]))
        for i in range(scales.shape[0])
        for j in range(scales.shape[1])
    ]


# Relative error of the outputs of one expert for random inputs, of weights drawn from a normal
# distribution: twice what was seen.
ERRORS = {"fp8": 0.09, "int8": 0.02, "int4": 0.3, "mxfp4": 0.4, "nvfp4": 0.3}


@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_model_computes_with_a_pack_as_with_the_decoded_weights(
    name: str, original_names: bool, tmp_path: Path, seed: int
) -> None:
    source = write_checkpoint(
        tmp_path / "a", seed=seed, dtype=torch.bfloat16, original_names=original_names, **SIZES
    )
    report = moeinf.pack(source, tmp_path / "b", format=name, max_shard_size="100KB")
    assert report.one_read and 0 < max(report.errors.values()) < ERRORS[name]
    assert report.bytes < report.source_bytes
    store = ExpertStore.open(tmp_path / "b")
    decoded = {n: t for n, t in tensors_of(source).items() if ".experts." not in n}
    assert same({n: t for n, t in tensors_of(tmp_path / "b").items() if n in decoded}, decoded)
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            slot = torch.zeros(1, store.slot_bytes, dtype=torch.uint8)
            for segment, part in store.read(layer, expert).items():
                store.layout.views(slot)[segment][0] = part
            matrices = store.layout.matrices(slot)
            for word in ("gate", "up", "down"):
                one = getattr(matrices, word)
                pieces = {VALUES: one.values, SCALES: one.scales, MULTIPLIER: one.multiplier}
                found = {piece: part[0] for piece, part in pieces.items() if part is not None}
                numbers = store.layout.down.format.dequantise(found).float()
                decoded[f"{store.modules[layer]}.{expert}.{word}_proj.weight"] = numbers
    shutil.copytree(source, tmp_path / "c")
    save_file(decoded, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    found, expected = (
        logits(moeinf.load(tmp_path / one, slots=4, dtype=torch.float32)) for one in ("b", "c")
    )
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


# The largest error of a weight, in the largest weight of those that share its scale: half a step
# of integers, with a scale that was rounded to bf16; half of the widest step of floats.
STEPS = {"int8": 0.5 / 127.5, "int4": 0.5 / 7.5, "mxfp4": 0.25, "fp8": 16 / 448}
PAIRS = [("int4", "int8"), ("nvfp4", "int8"), ("int4", "int4"), ("int8", "mxfp4"), ("fp8", "fp8")]


@pytest.mark.parametrize("most", [1 << 22, 1 << 12], ids=["whole", "panels"])
@pytest.mark.parametrize(("name", "dense"), PAIRS)
def test_linear_layers_are_packed_too_where_asked(
    name: str, dense: str, most: int, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PANEL", most)
    sizes = {**SIZES, "head_dim": 32, "vocab_size": 200}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    report = moeinf.pack(source, tmp_path / "b", format=name, dense=dense)
    assert report.dense == dense and 0 < report.errors[linear.MODULE] < ERRORS[dense]
    before, stored = tensors_of(source), Checkpoint.open(tmp_path / "b").tensors
    packed = {key for key, entry in stored.items() if isinstance(entry, PackedEntry)}
    assert packed == {key for key in before if key.endswith(("_proj.weight", "lm_head.weight"))}
    decoded = {key: tensor.float() for key, tensor in before.items()}
    decoded |= {key: read_tensor(stored[key]).float() for key in packed}
    for key in (key for key in packed if ".experts." not in key):
        high, wide = TARGETS[dense].row.block if dense == "fp8" else (1, 32)
        change = (decoded[key] - before[key].float()).abs()
        for i, j in product(range(0, len(change), high), range(0, change.shape[1], wide)):
            # The scale of int8 is that of 32 columns here or of more, so of the row at most.
            # A scale that bf16 rounds down cuts off the largest weight.
            own = before[key][i : i + high] if dense == "int8" else before[key][i:, j : j + wide]
            size = float(own[:high].abs().max())
            assert float(change[i : i + high, j : j + wide].max()) <= (STEPS[dense] + 2**-8) * size
    shutil.copytree(source, tmp_path / "c")
    save_file(decoded, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"slots": 4, "dtype": torch.float32, "device": "cpu"}
    expected = logits(moeinf.load(tmp_path / "c", **options))
    for how in ("decoded", "packed"):
        found = logits(moeinf.load(tmp_path / "b", dense=how, **options))
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_linear_layers_of_other_names_than_the_models(tmp_path: Path, seed: int) -> None:
    """Published files often lack the prefix of the model, or have another one."""
    sizes = {**SIZES, "head_dim": 32, "vocab_size": 200}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    tensors = {key.removeprefix("model."): one for key, one in tensors_of(source).items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    for folder in (source, bare):
        moeinf.pack(folder, tmp_path / f"{folder.name}-packed", format="int4", dense="int8")
    packs = [tmp_path / "a-packed", tmp_path / "bare-packed"]
    kinds = [
        {key.removeprefix("model."): one.format for key, one in tensors.items()
         if isinstance(one, PackedEntry)}
        for tensors in (Checkpoint.open(one).tensors for one in packs)
    ]  # fmt: skip
    assert kinds[0] == kinds[1]
    assert {one.name for one in kinds[1].values()} == {"int4", "int8"}
    found = [
        moeinf.load(tmp_path / name, slots=4, device="cpu") for name in ("a-packed", "bare-packed")
    ]
    assert torch.equal(*map(logits, found))


@pytest.mark.parametrize(
    ("name", "dense"), [(None, "int8"), ("bf16", "int8"), ("fp8", "int8"), ("int4", "fp8"),
                        ("int4", "nvfp4"), ("int4", "q4_0")],
)  # fmt: skip
def test_formats_of_linear_layers_that_do_not_go_with_the_experts(
    plain: Path, tmp_path: Path, name: str | None, dense: str
) -> None:
    with pytest.raises(ValueError, match=f"dense='{dense}'"):
        moeinf.pack(plain, tmp_path / "b", format=name, dense=dense)
    assert not (tmp_path / "b").exists()


def test_linear_layers_beside_experts_that_are_in_the_format_already(
    plain: Path, tmp_path: Path
) -> None:
    """They are not left as they are without a word."""
    moeinf.pack(plain, tmp_path / "b", format="int4")
    with pytest.raises(UnsupportedError, match="is quantised already"):
        moeinf.pack(tmp_path / "b", tmp_path / "c", format="int4", dense="int8")
    assert not (tmp_path / "c").exists()


def test_transformers_opens_an_fp8_pack(tmp_path: Path, seed: int) -> None:
    """By its own decoder, which wants whole blocks; it computes in bfloat16."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    moeinf.pack(source, tmp_path / "b", format="fp8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    expected = logits(theirs)
    found = logits(moeinf.load(tmp_path / "b", slots=4, dtype=torch.float32))
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-2


def test_float32_experts_are_rounded_to_bf16(tmp_path: Path, seed: int) -> None:
    source = write_checkpoint(tmp_path / "a", seed=seed)
    report = moeinf.pack(source, tmp_path / "b", format="bf16")
    assert 0 < max(report.errors.values()) < 0.01
    expected = tensors_of(source)
    for name, tensor in expected.items():
        if ".experts." in name:
            expected[name] = tensor.bfloat16()
    assert same(tensors_of(tmp_path / "b"), expected)


# What cannot be


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4"])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_quantised_weights_are_not_quantised_again(
    plain: Path, tmp_path: Path, name: str, format: str
) -> None:
    source, _ = quantised(plain, tmp_path, name, 0)
    with pytest.raises(UnsupportedError, match="is quantised already, and would lose twice"):
        moeinf.pack(source, tmp_path / "pack", format=format)
    assert not (tmp_path / "pack").exists()


def test_columns_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", dtype=torch.bfloat16)  # 40 columns
    for name in ("int8", "int4", "mxfp4", "nvfp4"):
        with pytest.raises(UnsupportedError, match=r"expected columns in groups of \d+, found 40"):
            moeinf.pack(source, tmp_path / "b", format=name)
    moeinf.pack(source, tmp_path / "b", format="fp8")  # blocks may be smaller at the edges


def test_a_weight_that_is_no_number_is_refused(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "a"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts, expert 2, up: expected fini"):
        moeinf.pack(source, tmp_path / "b", format="fp8")
    moeinf.pack(source, tmp_path / "c")  # a copy judges nothing


def test_experts_with_biases_are_not_quantised(tmp_path: Path) -> None:
    sizes = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 8,
    }
    source = write_checkpoint(tmp_path / "a", "gpt_oss", dtype=torch.bfloat16, **SIZES, **sizes)
    with pytest.raises(UnsupportedError, match="experts with biases are not quantised"):
        moeinf.pack(source, tmp_path / "b", format="fp8")
    moeinf.pack(source, tmp_path / "b")
    assert same(tensors_of(tmp_path / "b"), tensors_of(source))


def test_names_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    source = write_checkpoint(tmp_path / "a", "granitemoe", dtype=torch.bfloat16, **SIZES, **sizes)
    refusal = "its experts cannot be stored so: no tensor for "
    with pytest.raises(UnsupportedError, match=refusal) as raised:
        moeinf.pack(source, tmp_path / "b", format="fp8")
    assert gettempdir() + "/moeinf-" not in str(raised.value)  # a folder that is gone
    assert not (tmp_path / "b").exists()


def test_folders_that_cannot_be_written_to(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    for dest, message in (
        (tmp_path / "full", "expected an empty folder, or none"),
        (source, "lies in"),
        (source / "pack", "lies in"),
        (tmp_path / "link" / "pack", "lies in"),
        (tmp_path / "source" / ".." / "source" / "x", "lies in"),
    ):
        with pytest.raises(ValueError, match=message):
            moeinf.pack(source, dest)
    with pytest.raises(NotADirectoryError, match="expected a folder, found a file"):
        moeinf.pack(source, tmp_path / "file")
    assert same(tensors_of(source), tensors_of(plain)) and not (source / "pack").exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="no format is named 'int5'; there are: bf16, fp8"):
        moeinf.pack(source, tmp_path / "new", format="int5")
    (tmp_path / "empty").mkdir()
    moeinf.pack(source, tmp_path / "empty")


# Interruptions


def interrupt(at: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= at * total:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("format", [None, "nvfp4"])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 1.0])
def test_an_interrupted_pack_goes_on(
    plain: Path, tmp_path: Path, format: str | None, at: float
) -> None:
    options: Any = {"format": format, "max_shard_size": "40KB"}
    whole = moeinf.pack(plain, tmp_path / "whole", **options)
    assert whole.files > 4
    with pytest.raises(KeyboardInterrupt):
        moeinf.pack(plain, tmp_path / "half", progress=interrupt(at), **options)
    with pytest.raises(CheckpointError):  # nothing takes it for a checkpoint
        moeinf.load(tmp_path / "half")
    report = moeinf.pack(plain, tmp_path / "half", **options)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")
    assert report.errors == pytest.approx(whole.errors)  # sums in another order
    assert at * 0.5 * report.bytes <= report.resumed_bytes < max(at, 0.01) * report.bytes


def test_an_unfinished_pack_of_something_else_is_left_alone(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    with pytest.raises(KeyboardInterrupt):
        moeinf.pack(source, tmp_path / "b", progress=interrupt(0.5), max_shard_size="40KB")
    before = bytes_of(tmp_path / "b")
    with pytest.raises(CheckpointError, match="an unfinished pack of other files or another form"):
        moeinf.pack(source, tmp_path / "b", format="fp8", max_shard_size="40KB")
    os.utime(source / "model.safetensors", ns=(1, 1))  # written to since
    with pytest.raises(CheckpointError, match="an unfinished pack of other files or another form"):
        moeinf.pack(source, tmp_path / "b", max_shard_size="40KB")
    assert bytes_of(tmp_path / "b") == before
    (tmp_path / "b" / STATE).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged: delete"):
        moeinf.pack(source, tmp_path / "b", max_shard_size="40KB")


@pytest.mark.parametrize("damage", ["byte", "header", "short", "gone"])
def test_finished_files_are_verified(plain: Path, tmp_path: Path, damage: str) -> None:
    options: Any = {"max_shard_size": "40KB"}
    with pytest.raises(KeyboardInterrupt):
        moeinf.pack(plain, tmp_path / "b", progress=interrupt(0.6), **options)
    path = sorted((tmp_path / "b").glob("*.safetensors"))[-1]
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(raw[:-1])
    else:
        raw[20 if damage == "header" else -5] ^= 1
        path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is not what an earlier call wrote: delete"):
        moeinf.pack(plain, tmp_path / "b", **options)


# Disks


def test_a_disk_without_room_is_known_before(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CapacityError, match=r"the pack needs [\d,]+ bytes more, 1,000 are free"):
        moeinf.pack(plain, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.safetensors*"))
    monkeypatch.undo()
    moeinf.pack(plain, tmp_path / "b")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fills_up_is_named_and_the_pack_goes_on(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    options: Any = {"format": "int4", "max_shard_size": "40KB"}
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(writer.os, call, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        moeinf.pack(plain, tmp_path / "b", **options)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(tmp_path / "b" / "model-"))
    monkeypatch.undo()
    moeinf.pack(plain, tmp_path / "b", **options)
    moeinf.pack(plain, tmp_path / "c", **options)
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "c")


def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeinf.pack(plain, tmp_path / "a")
    real = os.open

    def refuses(path: Any, flags: int, *mode: int, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(writer.os, "open", refuses)
    moeinf.pack(plain, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_writes_that_the_system_cuts_short_are_continued(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeinf.pack(plain, tmp_path / "a")
    real = os.pwrite
    monkeypatch.setattr(
        writer.os, "pwrite", lambda fd, data, offset: real(fd, data[: len(data) // 2 or 1], offset)
    )
    moeinf.pack(plain, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


# The command


def test_the_command(plain: Path, tmp_path: Path) -> None:
    def moeinf_pack(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moeinf.cli", "pack", str(plain), *words]
        return subprocess.run(command, capture_output=True, text=True)

    done = moeinf_pack(str(tmp_path / "b"), "--format", "int4", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["format"] == "int4" and len(report["errors"]) == 2
    with safe_open(sorted((tmp_path / "b").glob("*.safetensors"))[-1], "pt") as file:
        assert any(name.endswith(".weight_packed") for name in file.keys())  # noqa: SIM118
    again = moeinf_pack(str(tmp_path / "b"))
    assert again.returncode == 1
    assert again.stderr.strip() == f"moeinf: {tmp_path / 'b'}: expected an empty folder, or none"
    words = moeinf_pack(str(tmp_path / "c"))
    assert words.returncode == 0 and "one read" in words.stdout and "to the bit" in words.stdout

"""NaN, infinities and wrong signs in weights and scales: refused where they are read, by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from fake_cuda_library import fake_cuda_library
from safetensors.torch import load_file, save_file
from scaled_weights import INT4
from test_packed_checkpoints import (
    INT4_CONFIG,
    SIZES,
    STORED,
    logits,
    packed_words,
    quantised,
    stored_as,
)

import moeinf
from moeinf import _core
from moeinf.checkpoint.formats import SCALES, VALUES, ZEROS
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, ReadError

TYPES = {
    "f32": (np.uint32, torch.float32),
    "bf16": (np.uint16, torch.bfloat16),
    "f16": (np.uint16, torch.float16),
    "e4m3": (np.uint8, torch.float8_e4m3fn),
    "e8m0": (np.uint8, torch.float8_e8m0fnu),
}


def all_or_many(bits: Any, rng: np.random.Generator) -> np.ndarray:
    """Every code of 8 bits; of wider numbers random ones, and those beside a border."""
    size = 8 * np.dtype(bits).itemsize
    if size == 8:
        return np.arange(256, dtype=bits)
    mantissas = (23,) if size == 32 else (7, 10)
    one, sign = 1, 1 << (size - 1)
    infinities = [sign - (one << mantissa) for mantissa in mantissas]
    edges = [0, 1, sign - 1, sign, sign + 1, *(i + d for i in infinities for d in (-1, 0, 1))]
    both = [*edges, *(edge | sign for edge in edges)]
    return np.concatenate([np.array(both, bits), rng.integers(0, 1 << size, 300, bits)])


@pytest.mark.parametrize("odd", [0, 1])  # odd: a block of the file may end inside a number
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("apart", [1, 17])  # 17: other bytes lie between the numbers, as in blocks
@pytest.mark.parametrize("name", TYPES)
def test_a_reader_finds_every_bad_code_anywhere(tmp_path, seed, name, apart, negative, direct, odd):
    rng = np.random.default_rng(seed)
    bits, dtype = TYPES[name]
    codes = all_or_many(bits, rng)
    unit, begin, count = np.dtype(bits).itemsize, 64, int(rng.integers(40_000, 50_000)) // apart
    step = apart * unit
    nbytes = begin + count * step + 9
    # Around the numbers anything may lie.
    experts = rng.integers(0, 256, (len(codes), nbytes), np.uint8)
    inside = experts[:, begin : begin + count * step].reshape(len(codes), count, step)
    inside[:, :, :unit] = 1
    places = rng.integers(0, count, len(codes))
    places[:2] = 0, count - 1
    for expert, place, code in zip(experts, places, codes, strict=True):
        at = begin + place * step
        expert[at : at + unit] = np.array([code], bits).view(np.uint8)
    stride = -(-nbytes // 4) * 4
    path, extents, data = tmp_path / "weights.bin", [], bytearray(odd)
    for expert in experts:
        extents.append([[0, len(data), nbytes, 0]])
        data += expert.tobytes() + bytes(stride - nbytes)
    path.write_bytes(data)
    checks = [(begin, count * step, getattr(_core.ScaleType, name), negative, step)]
    tensors = [(0, extent[0][1], f"tensor {i}") for i, extent in enumerate(extents)]
    catalog = _core.Catalog(
        1, len(codes), -(-nbytes // 4096) * 4096, [(str(path), len(data))],
        np.array(extents, np.uint64), [], checks, tensors,
    )  # fmt: skip
    reader = _core.FileReader(catalog, threads=2, direct=direct, chunk_bytes=16384)
    pool = _core.SlotPool(catalog.slot_bytes, 1)
    numbers = torch.from_numpy(codes.copy()).view(dtype).double()
    for e, number in enumerate(numbers.tolist()):
        ticket = reader.submit(e, pool, 0)
        ticket.wait()
        if np.isfinite(number) and (negative or not number < 0):
            assert ticket.state == "done", (number, ticket.error)
        else:
            assert ticket.state == "failed", number
            shown = f"0x{int(codes[e]):0{2 * unit}x}"
            at = begin + int(places[e]) * step
            assert f"{path}: tensor {e}: expected finite numbers" in ticket.error
            assert f"{shown} at byte {at}" in ticket.error


@pytest.mark.parametrize("direct", [True, False])
def test_a_reader_finds_every_zero_point_of_more_than_four_bits(tmp_path, seed, direct):
    rng = np.random.default_rng(seed)
    begin, count, nbytes = 64, 20_000, 24_576
    experts = rng.integers(0, 256, (256, nbytes), np.uint8)  # around them anything may lie
    experts[:, begin : begin + count] = rng.integers(-8, 8, (256, count), np.int8).view(np.uint8)
    places = rng.integers(0, count, 256)
    places[8:10] = 0, count - 1
    experts[np.arange(256), begin + places] = np.arange(256)
    (tmp_path / "a").write_bytes(experts.tobytes())
    extents = [[[0, e * nbytes, nbytes, 0]] for e in range(256)]
    catalog = _core.Catalog(
        1, 256, nbytes, [(str(tmp_path / "a"), experts.nbytes)], np.array(extents, np.uint64), [],
        [(begin, count, None, True, 1)], [(0, e * nbytes, f"tensor {e}") for e in range(256)],
    )  # fmt: skip
    reader = _core.FileReader(catalog, threads=2, direct=direct, chunk_bytes=16384)
    pool = _core.SlotPool(catalog.slot_bytes, 1)
    for e in range(256):
        ticket = reader.submit(e, pool, 0)
        ticket.wait()
        if e < 8 or e >= 248:
            assert ticket.state == "done", (e, ticket.error)
        else:
            wanted = f"tensor {e}: expected zero points from -8 to 7, found I8 0x{e:02x} at byte "
            assert ticket.error.endswith(f"{wanted}{begin + int(places[e])}")


@pytest.mark.parametrize("check", [(0, 8192, "f32"), (4096, 8, "f32"), (1 << 63, 4, "f32"),
                                   (0, 6, "f32"), (0, 3, "bf16")])  # fmt: skip
def test_a_check_stays_in_the_slot_and_has_whole_numbers(tmp_path, check):
    (tmp_path / "a").write_bytes(bytes(64))
    offset, nbytes, name = check
    kind = getattr(_core.ScaleType, name)
    with pytest.raises(ValueError, match="check of"):
        _core.Catalog(1, 1, 4096, [(str(tmp_path / "a"), 64)], [[[0, 0, 64, 0]]],
                      checks=[(offset, nbytes, kind, True, 4)])  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe", **SIZES)


WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DOWN = "model.layers.1.mlp.experts.3.down_proj"


def bad_codes(name: str, piece: str) -> list[int]:
    """Of the numbers of this piece of a stored format: which codes are refused."""
    row = STORED[name][0]
    if piece == VALUES:
        return [0x7F, 0xFF] if row.name == "e4m3" else []
    one_byte = {"e8m0": [255], "e4m3": [0x7F, 0xFF, 0x81, 0xF6]}
    wide = {
        "f32": [0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000],
        "bf16": [0x7FC0, 0x7F80, 0xFF80, 0xBF80],
        "f16": [0x7E00, 0x7C00, 0xFC00, 0xBC00],
    }
    codes = {**one_byte, **wide}.get(row.scales or "", [])
    return codes[:3] if row.name.startswith("int") else codes


def plant(folder: Path, stem: str, piece: str, name: str, code: int, seed: int) -> str:
    """Puts the code somewhere into the piece of one matrix; returns the name of the tensor."""
    tensors = load_file(folder / "model.safetensors")
    (key,) = [
        key for key, tensor in tensors.items()
        if key.startswith(f"{stem}.") and tensor.dim() > 1
        and ("scale" in key.removeprefix(stem)) == (piece == SCALES)
    ]  # fmt: skip
    flat = tensors[key].view(WORDS.get(tensors[key].dtype, torch.uint8)).view(-1)
    at = int(torch.randint(len(flat), (), generator=torch.Generator().manual_seed(seed)))
    sign = 1 << (8 * flat.element_size() - 1)
    flat[at] = code - 2 * sign if flat.dtype != torch.uint8 and code >= sign else code
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return key


CASES = [
    (name, piece, code) for name in STORED for piece in (VALUES, SCALES)
    for code in bad_codes(name, piece)
]  # fmt: skip


@pytest.mark.parametrize(("name", "piece", "code"), CASES)
def test_a_model_refuses_a_bad_number_of_an_expert(
    plain, tmp_path, seed, name, piece, code, monkeypatch
):
    packed, _ = quantised(plain, tmp_path, name, seed)
    key = plant(packed, DOWN, piece, name, code, seed)
    with pytest.raises(ReadError, match=rf"{DOWN.rsplit('.', 3)[0]}.*expected finite numbers"):
        ExpertStore.open(packed).read(1, 3)
    monkeypatch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(3))
    for device in ("cpu", "cuda"):
        model = moeinf.load(packed, device=device, dtype=torch.float32, slots=3)
        with torch.no_grad(), pytest.raises(ReadError) as raised:
            model(tokens)
        assert f"model.safetensors: {key}: expected finite numbers" in str(raised.value), device
        assert f"0x{code:02x} at byte" in str(raised.value)


@pytest.mark.parametrize("far", [-128, -9, 8, 127])
@pytest.mark.parametrize("which", [".experts.", "self_attn"])
def test_zero_points_of_more_than_four_bits_are_refused(plain, tmp_path, seed, which, far):
    """They may be stored as bytes, but a product of integers of four bits takes no others."""
    row = INT4.with_scales("bf16", (1, 32), zeros=True)
    words = packed_words(4)

    def store(parts):
        return words(parts) | {".weight_zero_point": parts[ZEROS]}

    packed, decoded = stored_as(plain, tmp_path, {which: (row, store)}, INT4_CONFIG, seed)
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    tensors = load_file(packed / "model.safetensors")
    key = [key for key in tensors if key.endswith("weight_zero_point")][-1]
    flat = tensors[key].view(-1)
    flat[int(torch.randint(len(flat), (), generator=torch.Generator().manual_seed(seed)))] = far
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReadError, match="expected zero points from -8 to 7, found"):
        logits(packed)
    if which == ".experts.":
        layer, expert = (int(key.split(".")[i]) for i in (2, 5))
        with pytest.raises(ReadError, match="expected zero points from -8 to 7, found"):
            ExpertStore.open(packed).read(layer, expert)


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4", "int4"])
def test_dense_weights_are_refused_too(plain, tmp_path, seed, name):
    packed, _ = quantised(plain, tmp_path, name, seed, which="_proj")
    stem = "model.layers.0.self_attn.q_proj"
    plant(packed, stem, SCALES, name, bad_codes(name, SCALES)[0], seed)
    with pytest.raises(ReadError, match=rf"{stem}.*scales: expected finite numbers"):
        logits(packed)


@pytest.mark.parametrize("name", STORED)
def test_a_scale_of_zero_is_a_block_of_zeros(plain, tmp_path, seed, name):
    """Quantisers write it for a block whose values are all too small."""
    row = STORED[name][0]
    if row.scales in (None, "e8m0"):
        pytest.skip("has no scale of zero")
    packed, decoded = quantised(plain, tmp_path, name, seed)
    key = plant(packed, DOWN, SCALES, name, 0, seed)
    numbers = load_file(decoded / "model.safetensors")
    before = numbers[f"{DOWN}.weight"].clone()
    scales = load_file(packed / "model.safetensors")[key]
    flat = (scales.T if key.endswith(".scales") else scales).reshape(-1)  # GPTQ, AWQ: by column
    block = int((flat.float() == 0).nonzero())
    high, wide = row.block[0], row.block[1] or before.shape[1]
    across = -(-before.shape[1] // wide)
    y, x = high * (block // across), wide * (block % across)
    numbers[f"{DOWN}.weight"][y : y + high, x : x + wide] = 0
    assert not torch.equal(numbers[f"{DOWN}.weight"], before)
    save_file(numbers, decoded / "model.safetensors", metadata={"format": "pt"})
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["int4", "int8 channels"])
def test_scales_of_integers_may_be_negative(plain, tmp_path, seed, name):
    """AutoRound turns the sign of a group whose largest value is negative."""
    packed, decoded = quantised(plain, tmp_path, name, seed)
    for folder, end in ((packed, ".weight_scale"), (decoded, ".weight")):
        tensors = load_file(folder / "model.safetensors")
        tensors[DOWN + end] = -tensors[DOWN + end]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "end"), [("nvfp4", ".weight_scale_2"),
                                           ("nvfp4, divided", ".weight_global_scale"),
                                           ("fp8 tensor", ".weight_scale")])  # fmt: skip
def test_a_number_for_a_whole_matrix_is_above_zero(plain, tmp_path, name, end, number):
    packed, _ = quantised(plain, tmp_path, name, 0)
    tensors = load_file(packed / "model.safetensors")
    tensors[DOWN + end] = torch.full_like(tensors[DOWN + end], number)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{DOWN}{end}.*expected a number above zero"):
        _ = ExpertStore.open(packed).catalog


def test_scales_at_an_odd_place_in_the_file(plain, tmp_path, seed):
    """The header's length is anything; a scale of 4 bytes may lie across two blocks."""
    packed, _ = quantised(plain, tmp_path, "fp8 blocks", seed)
    plant(packed, DOWN, SCALES, "fp8 blocks", 0x7F800000, seed)
    path = packed / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 4 + 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    with pytest.raises(ReadError, match=r"weight_scale_inv: expected finite.*F32 0x7f800000"):
        logits(packed)

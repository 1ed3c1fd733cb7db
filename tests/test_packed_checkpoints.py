"""Checkpoints of quantised weights, as each quantiser names and shapes its tensors: they open, and
the model computes what it computes with the decoded weights in float32."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from scaled_weights import E2M1, E4M3, INT4, INT8, random_bytes, zero_points

import moeinf
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.formats import (
    FORMATS,
    MULTIPLIER,
    PLAIN_FORMATS,
    SCALES,
    VALUES,
    ZEROS,
    WeightFormat,
)
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.experts.packed_linear import PackedLinear
from moeinf.planning.model import read_model

Parts = dict[str, torch.Tensor]
SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "num_hidden_layers": 2}


def draw(row: WeightFormat, rows: int, cols: int, rng: torch.Generator) -> Parts:
    """Random pieces of a matrix whose elements are about as large as those of a trained one."""
    if row in PLAIN_FORMATS.values():
        return {VALUES: (0.3 * torch.randn(rows, cols, generator=rng)).to(row.values)}
    parts = {}
    for piece, (dtype, shape) in row.segments(rows, cols).items():
        parts[piece] = torch.empty(shape, dtype=dtype)
        if piece == VALUES:
            random_bytes(parts[piece], rng)
        if piece == ZEROS:
            parts[piece] = torch.randint(*zero_points(row), shape, generator=rng).to(dtype)
    size = 0.3 / math.sqrt(float(row.decode(parts[VALUES]).square().mean()))
    if SCALES in parts:
        drawn = torch.rand(parts[SCALES].shape, generator=rng) + 0.5
        if row.scales == "e8m0":
            parts[SCALES] = (127 + (drawn * size).log2().round()).to(torch.uint8)
        else:
            parts[SCALES] = (drawn * (20 if row.multiplier else size)).to(parts[SCALES].dtype)
    if MULTIPLIER in parts:
        drawn = torch.rand(1, generator=rng) + 0.5
        parts[MULTIPLIER] = (drawn * size / (20 if row.scales else 1)).float()
    return parts


def codes_of(parts: Parts, bits: int) -> tuple[list[list[int]], list[list[int]]]:
    """The unsigned integers of a matrix by row and column, and its zero points by row and group."""
    stored = parts[VALUES].view(torch.uint8).tolist()
    if bits == 4:
        stored = [[half for byte in row for half in (byte & 15, byte >> 4)] for row in stored]
    else:
        stored = [[(byte + 128) % 256 for byte in row] for row in stored]
    zeros = (parts[ZEROS].int() + (1 << (bits - 1))).tolist() if ZEROS in parts else []
    return stored, zeros


def words_of(integers: list[list[int]], bits: int, order: Sequence[int] | None = None):
    """Packs integers of a row one after another, the first one lowest, into words of 32 bits.

    `order`: integer i of a word is number order[i] of those that belong to it.
    """
    each = 32 // bits
    order = range(each) if order is None else order
    words = []
    for row in integers:
        words.append([])
        for first in range(0, len(row), each):
            word = sum(row[first + place] << (bits * i) for i, place in enumerate(order))
            words[-1].append(word - (1 << 32) if word >= 1 << 31 else word)
    return torch.tensor(words, dtype=torch.int32)


def turned(integers: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*integers, strict=True)]


def packed_words(bits: int) -> Callable[[Parts], Parts]:
    """compressed-tensors: values packed along the columns, zero points along the rows."""

    def store(parts: Parts) -> Parts:
        values, zeros = codes_of(parts, bits)
        found = {
            ".weight_packed": words_of(values, bits),
            ".weight_scale": parts[SCALES],
            ".weight_shape": torch.tensor([len(values), len(values[0])]),
        }
        if zeros:
            found[".weight_zero_point"] = words_of(turned(zeros), bits).T.contiguous()
        return found

    return store


def gptq(bits: int, less: int) -> Callable[[Parts], Parts]:
    def store(parts: Parts) -> Parts:
        values, zeros = codes_of(parts, bits)
        zeros = [[(zero - less) % (1 << bits) for zero in row] for row in zeros]
        inputs, groups = len(values[0]), len(zeros[0])
        return {
            ".qweight": words_of(values, bits).T.contiguous(),
            ".qzeros": words_of(turned(zeros), bits),
            ".scales": parts[SCALES].T.contiguous(),
            ".g_idx": torch.tensor([k // (inputs // groups) for k in range(inputs)]).int(),
        }

    return store


def awq(parts: Parts) -> Parts:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    values, zeros = codes_of(parts, 4)
    return {
        ".qweight": words_of(turned(values), 4, order),
        ".qzeros": words_of(turned(zeros), 4, order),
        ".scales": parts[SCALES].T.contiguous(),
    }


def nvfp4_divided(parts: Parts) -> Parts:
    divisor = 1 / parts[MULTIPLIER]
    parts[MULTIPLIER] = 1 / divisor  # what the reader makes of it
    return {
        ".weight_packed": parts[VALUES],
        ".weight_scale": parts[SCALES],
        ".weight_global_scale": divisor,
        ".input_global_scale": torch.ones(1),
    }


def scaled_as(values: str, scales: str, **more: Any) -> Callable[[Parts], Parts]:
    return lambda parts: {values: parts[VALUES], scales: parts[SCALES], **more}


INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"],
                                  "weights": {"num_bits": 4, "type": "int", "symmetric": True}}},
}  # fmt: skip
INT8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
GPTQ_V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
MODELOPT = {"quant_method": "modelopt"}
TENSORS = {"quant_method": "compressed-tensors"}
# Name: format, configuration, tensors by the ends of their names.
STORED: dict[str, tuple[WeightFormat, dict[str, Any], Callable[[Parts], Parts]]] = {
    "fp8 blocks": (E4M3.with_scales("f32", (32, 32)), FP8,
                   scaled_as(".weight", ".weight_scale_inv")),
    "fp8 blocks of 128": (E4M3.with_scales("bf16", (128, 128)), {"quant_method": "fp8"},
                          scaled_as(".weight", ".weight_scale_inv")),
    "fp8 blocks, e8m0 scales": (
        E4M3.with_scales("e8m0", (32, 32)), FP8,
        lambda p: {".weight": p[VALUES], ".scale": p[SCALES].view(torch.float8_e8m0fnu)},
    ),
    "fp8 channels": (E4M3.with_scales("bf16", (1, 0)), TENSORS,
                     scaled_as(".weight", ".weight_scale")),
    "fp8 tensor": (
        E4M3.with_scales(None, None, multiplier=True), MODELOPT,
        lambda p: {".weight": p[VALUES], ".weight_scale": p[MULTIPLIER][0],
                   ".input_scale": torch.tensor(1.0)},
    ),
    "mxfp8": (E4M3.with_scales("e8m0", (1, 32)), {"quant_method": "mxfp8"},
              scaled_as(".weight", ".weight_scale_inv")),
    "fp4 of DeepSeek-V4": (
        E2M1.with_scales("e8m0", (1, 32)), FP8,
        lambda p: {".weight": p[VALUES].view(torch.int8),
                   ".scale": p[SCALES].view(torch.float8_e8m0fnu)},
    ),
    "mxfp4": (E2M1.with_scales("e8m0", (1, 32)), TENSORS,
              scaled_as(".weight_packed", ".weight_scale")),
    "nvfp4": (
        E2M1.with_scales("e4m3", (1, 16), multiplier=True), MODELOPT,
        lambda p: {".weight": p[VALUES], ".weight_scale": p[SCALES],
                   ".weight_scale_2": p[MULTIPLIER][0], ".input_scale": torch.tensor(1.0)},
    ),
    "nvfp4, divided": (E2M1.with_scales("e4m3", (1, 16), multiplier=True), TENSORS, nvfp4_divided),
    "int4": (INT4.with_scales("bf16", (1, 32)), INT4_CONFIG, packed_words(4)),
    "int4 channels": (INT4.with_scales("f16", (1, 0)), INT4_CONFIG, packed_words(4)),
    "int4 with zero points": (INT4.with_scales("bf16", (1, 32), zeros=True), INT4_CONFIG,
                              packed_words(4)),
    "int4 channels with zero points": (INT4.with_scales("f16", (1, 0), zeros=True), INT4_CONFIG,
                                       packed_words(4)),
    "int8 words": (INT8.with_scales("bf16", (1, 32)), INT8_CONFIG, packed_words(8)),
    "int8 words with zero points": (INT8.with_scales("f16", (1, 0), zeros=True), INT8_CONFIG,
                                    packed_words(8)),
    "int8 with zero points": (
        INT8.with_scales("f32", (1, 0), zeros=True), TENSORS,
        lambda p: {".weight": p[VALUES], ".weight_scale": p[SCALES],
                   ".weight_zero_point": p[ZEROS]},
    ),
    "gptq": (INT4.with_scales("f16", (1, 32), zeros=True), GPTQ, gptq(4, 1)),
    "gptq, second version": (INT4.with_scales("f16", (1, 32), zeros=True), GPTQ_V2, gptq(4, 0)),
    "gptq, one group": (INT4.with_scales("bf16", (1, 0), zeros=True), {**GPTQ, "group_size": -1},
                        gptq(4, 1)),
    "gptq of 8 bits": (INT8.with_scales("f16", (1, 32), zeros=True), {**GPTQ, "bits": 8},
                       gptq(8, 1)),
    "gptq of auto-round": (
        INT4.with_scales("f16", (1, 32), zeros=True),
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "group_size": 32},
        gptq(4, 1),
    ),
    "awq": (INT4.with_scales("f16", (1, 32), zeros=True), AWQ, awq),
    "awq, float32 scales": (INT4.with_scales("f32", (1, 32), zeros=True), AWQ, awq),
    "int8 channels": (INT8.with_scales("f32", (1, 0)), TENSORS,
                      scaled_as(".weight", ".weight_scale")),
}  # fmt: skip


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe", **SIZES)


def quantised(
    plain: Path, folder: Path, name: str, seed: int, which: str = ".experts."
) -> tuple[Path, Path]:
    """The checkpoint with every weight whose name has `which` stored so, and with the same numbers
    in float32."""
    row, config, store = STORED[name]
    return stored_as(plain, folder, {which: (row, store)}, config, seed)


def stored_as(
    plain: Path,
    folder: Path,
    kinds: dict[str, tuple[WeightFormat, Callable[[Parts], Parts]]],
    config: dict[str, Any],
    seed: int,
) -> tuple[Path, Path]:
    """The same by parts of names: of several that a name has, the first one counts."""
    rng = torch.Generator().manual_seed(seed)
    packed: Parts = {}
    decoded: Parts = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        fits = tensor.dim() == 2 and not (tensor.shape[0] % 8 or tensor.shape[1] % 32)
        kind = next((one for part, one in kinds.items() if part in key), None)
        if kind is not None and key.endswith("_proj.weight") and fits:
            row, store = kind
            parts = draw(row, *tensor.shape, rng)
            stem = key.removesuffix(".weight")
            packed |= {stem + end: part.clone() for end, part in store(parts).items()}
            decoded[key] = row.dequantise(parts).float()
        else:
            packed[key] = decoded[key] = tensor
    folders = []
    for kind, tensors in (("packed", packed), ("decoded", decoded)):
        target = folder / kind
        shutil.copytree(plain, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        folders.append(target)
    described = json.loads((folder / "packed" / "config.json").read_text())
    described["quantization_config"] = config
    (folder / "packed" / "config.json").write_text(json.dumps(described))
    return folders[0], folders[1]


def logits(folder: Path, tokens: int = 14, **options: Any) -> torch.Tensor:
    prompt = torch.randint(0, 97, (2, tokens // 2), generator=torch.Generator().manual_seed(3))
    budget = {} if "memory" in options else {"slots": 4}
    model = moeinf.load(folder, device="cpu", dtype=torch.float32, **{**budget, **options})
    with torch.no_grad():
        return model(prompt).logits


@pytest.mark.parametrize("name", STORED)
def test_a_model_computes_with_packed_weights_as_with_the_decoded_ones(plain, tmp_path, seed, name):
    packed, decoded = quantised(plain, tmp_path, name, seed)
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("name", STORED)
def test_a_store_reads_each_piece_as_it_was_written(plain, tmp_path, seed, name):
    packed, decoded = quantised(plain, tmp_path, name, seed)
    store, numbers = ExpertStore.open(packed), load_file(decoded / "model.safetensors")
    row = STORED[name][0]
    assert store.layout.down.format == row and store.layout.gate.format == row
    for layer, expert in ((0, 0), (1, store.num_experts - 1)):
        pool = torch.full((1, store.slot_bytes), 255, dtype=torch.uint8)
        for segment, part in store.read(layer, expert).items():
            store.layout.views(pool)[segment][0] = part
        matrices = store.layout.matrices(pool)
        for matrix in ("gate", "up", "down"):
            view = getattr(matrices, matrix)
            pieces = {VALUES: view.values, SCALES: view.scales, ZEROS: view.zeros,
                      MULTIPLIER: view.multiplier}  # fmt: skip
            found = row.dequantise({p: t[0] for p, t in pieces.items() if t is not None}).float()
            key = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"
            assert torch.equal(found, numbers[key])


PLAIN = FORMATS["bf16"], lambda parts: {".weight": parts[VALUES]}
INT8_UP = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
        "group_1": {"targets": ["re:.*up_proj$"], "weights": {"num_bits": 8, "group_size": 32}},
    },
    "ignore": ["lm_head"],
}
IGNORED = {**TENSORS, "ignore": ["re:.*gate_proj$"]}
# Gate, up and down of experts, each stored in its own way; and the configuration.
MIXED: dict[str, tuple[list[str | None], dict[str, Any]]] = {
    "int4 and int8": (["int4", "int8 words", "int4"], INT8_UP),
    "bf16 and fp8": ([None, "fp8 channels", "fp8 channels"], IGNORED),
    "nvfp4 and mxfp4": (["nvfp4", "mxfp4", "fp8 tensor"], MODELOPT),
}


@pytest.mark.parametrize("name", MIXED)
def test_gate_and_up_of_two_formats(plain, tmp_path, seed, name):
    """Equal to the decoded weights, with the same bits at any budget, and from a pack."""
    names, config = MIXED[name]
    rows = [PLAIN if one is None else (STORED[one][0], STORED[one][2]) for one in names]
    words = ("gate_proj", "up_proj", "down_proj")
    kinds = {f".{word}.": row for word, row in zip(words, rows, strict=True)}
    packed, decoded = stored_as(plain, tmp_path, kinds, config, seed)
    layout = ExpertStore.open(packed).layout
    assert [one.format for one in layout.named.values()] == [row for row, _ in rows]
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert torch.equal(logits(packed, slots=2), found)
    assert torch.equal(logits(packed, memory="100%"), found)
    moeinf.pack(packed, tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), found)


def widths(size: int = 32, **targets: list[str]) -> dict[str, Any]:
    """Groups of the widths that their names end in, such as a4 and b8, in this order."""
    weights = {"type": "int", "group_size": size}
    return {
        name: {"targets": of, "weights": {**weights, "num_bits": int(name[-1])}}
        for name, of in targets.items()
    }


DOWNS = [f"model.layers.{layer}.mlp.experts.{e}.down_proj" for layer in (0, 1) for e in range(6)]
# How down is stored where the other matrices are int4; and the groups, in the order of the file.
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "a class, and a name of another layer": ("int4", widths(a4=["Linear"], b8=["lm_head"])),
    "two classes": ("int4", widths(a8=["Embedding"], b4=["Linear"])),
    "a name before a class": ("int8 words", widths(a4=["Linear"], b8=DOWNS)),
    "a name before a pattern": ("int8 words", widths(a4=["re:.*experts.*"], b8=DOWNS)),
    "a pattern before a class": ("int8 words", widths(a4=["Linear"], b8=["re:.*down_proj"])),
    "the first pattern": ("int8 words", widths(a8=["re:.*down_proj"], b4=["re:.*experts"])),
    "the first pattern, where scales fit both": (
        "int8 words with zero points", widths(-1, a8=["re:.*no", "re:.*down"], b4=["re:.*"])),
    "the pattern that the scales fit": (
        "int8 words", widths(a4=["re:.*experts"], b8=["re:.*down_proj"])),
    "patterns match from the start": ("int4", widths(a4=["Linear"], b8=["re:down_proj"])),
    "a group without weights": (
        "int4", {"a": {"targets": ["re:.*experts"], "weights": None}, **widths(b4=["Linear"])}),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_the_group_of_a_module_says_how_wide_its_integers_are(plain, tmp_path, seed, name):
    down, groups = TARGETS[name]
    row, _, store = STORED[down]
    config = {**TENSORS, "config_groups": groups}
    kinds = {"down_proj": (row, store), ".experts.": (STORED["int4"][0], packed_words(4))}
    packed, decoded = stored_as(plain, tmp_path, kinds, config, seed)
    assert ExpertStore.open(packed).layout.down.format == row
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def group(targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    return {"g": {"targets": targets, "weights": {"num_bits": 4, "type": "int", **weights}}}


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (widths(a4=["re:.*attn.*"], b8=["Embedding"]), CheckpointError,
         r"model.safetensors: .*down_proj.weight_packed .*expected a target in config_groups of "
         r"config.json .*experts.0.down_proj' or its class Linear, found 'Embedding', 're:.*attn"),
        (widths(a4=["Linear"], b8=["Linear"]), CheckpointError,
         r"config.json: config_groups: b8: 'Linear' is a target of a4 too, .* 4 and 32; found 8"),
        (widths(a8=["Linear"]), CheckpointError,
         r"weight_scale .*expected a scale for each 1 x 32 .*with 8 bits, .* in a8"),
        (group(num_bits=3), UnsupportedError, "weight_packed.*3 bits, expected 4 or 8, .* in g"),
        (group(num_bits=[4]), CheckpointError, r"config.json: .* g: num_bits is \[4\], expected"),
        (group(num_bits="4"), CheckpointError, "config.json: .* g: num_bits is '4', expected"),
        (group(num_bits=None), CheckpointError, "config.json: .* g: num_bits is None, expected"),
        (group(num_bits=0), CheckpointError, "config.json: .* g: num_bits is 0, expected"),
        (group(group_size=[32]), CheckpointError, r"json: .* g: group_size is \[32\], expected"),
        (group(["re:("]), CheckpointError, r"config.json: .* g: targets has 're:\(', .*no pattern"),
        (group("Linear"), CheckpointError, "config.json: .* g: targets is 'Linear', expected a li"),
        (group([4]), CheckpointError, r"config.json: .* g: targets is \[4\], expected a list"),
        ({"g": ["Linear"]}, CheckpointError, r"json: config_groups: g is \['Linear'\], expected"),
        ({"g": {"weights": 4}}, CheckpointError, "json: config_groups: g: weights is 4, expected"),
        ([4], CheckpointError, r"config.json: config_groups is \[4\], expected an object"),
    ],
)  # fmt: skip
def test_groups_that_say_nothing_are_refused(plain, tmp_path, groups, error, message):
    packed, _ = quantised(plain, tmp_path, "int4", 0)
    rewrite(packed, lambda tensors: None, config_groups=groups)
    with pytest.raises(error, match=message):
        ExpertStore.open(packed)


def test_experts_of_two_widths_in_a_layer_are_refused_in_words(plain, tmp_path):
    kinds = {one: (STORED[name][0], STORED[name][2])
             for one, name in (("experts.1.", "int8 words"), (".experts.", "int4"))}  # fmt: skip
    config = {**TENSORS, "config_groups": widths(a8=["re:.*experts.1."], b4=["Linear"])}
    packed, _ = stored_as(plain, tmp_path, kinds, config, 0)
    with pytest.raises(CheckpointError) as refused:
        ExpertStore.open(packed)
    for said in (
        "experts.1.",
        "int8 / bf16 1x32, values with 128 added [",
        "experts must be alike",
    ):
        assert said in str(refused.value)
    assert "(turned" not in str(refused.value)


@pytest.mark.parametrize("name", STORED)
def test_dense_weights_may_be_packed_too(plain, tmp_path, seed, name):
    packed, decoded = quantised(plain, tmp_path, name, seed, which="_proj")
    expected = logits(decoded)
    for dense in ("decoded", "packed"):
        found = logits(packed, dense=dense)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    many = logits(packed, 40, dense="packed")
    torch.testing.assert_close(many, logits(decoded, 40), rtol=1e-3, atol=1e-3)


def test_auto_packs_what_the_kernels_of_the_cpu_compute(plain, tmp_path):
    folder, _ = quantised(plain, tmp_path, "int4", 0, which="_proj")

    def packed(**options) -> int:
        model = moeinf.load(folder, device="cpu", slots=4, **options)
        return sum(isinstance(one, PackedLinear) for one in model.modules())

    assert packed(dense="auto") == packed(dense="packed") > 0
    assert packed() == packed(dense="auto", linear="torch") == 0
    costs = read_model(Checkpoint.open(folder))
    whole = read_model(Checkpoint.open(plain))
    assert costs.dense_bytes < whole.dense_bytes and costs.loaded_bytes < whole.loaded_bytes


def test_a_model_with_packed_layers_is_an_ordinary_one(plain, tmp_path, seed):
    """Its class, names, state_dict and number of parameters; saved, it has the decoded weights."""
    packed, decoded = quantised(plain, tmp_path, "int4", seed, which="self_attn")
    served = moeinf.load(packed, device="cpu", dtype=torch.float32, slots=4, dense="packed")
    other = moeinf.load(decoded, device="cpu", dtype=torch.float32, slots=4)
    layers = {name for name, one in served.named_modules() if isinstance(one, PackedLinear)}
    stored = load_file(packed / "model.safetensors")
    ends = ".weight_packed"
    assert layers == {name.removesuffix(ends) for name in stored if name.endswith(ends)} != set()
    assert type(served).__name__ == type(other).__name__
    assert served.num_parameters() == other.num_parameters()
    mine, theirs = served.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, rtol=2**-22, atol=0)
    served.save_pretrained(tmp_path / "saved")
    saved, numbers = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", decoded)
    )
    assert saved.keys() == numbers.keys()
    for name, value in numbers.items():
        torch.testing.assert_close(saved[name].float(), value.float(), rtol=2**-22, atol=0)
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "saved", dense="packed"))


def test_packed_layers_do_not_depend_on_the_budget(plain, tmp_path, seed):
    packed, _ = quantised(plain, tmp_path, "nvfp4", seed, which="_proj")
    for dtype in (torch.bfloat16, torch.float32):
        found = []
        for slots in (1, 5, 64):
            model = moeinf.load(packed, device="cpu", dtype=dtype, slots=slots, dense="packed")
            prompt = torch.randint(0, 97, (1, 6), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                found.append(
                    model.generate(
                        prompt,
                        max_new_tokens=4,
                        do_sample=False,
                        output_logits=True,
                        return_dict_in_generate=True,
                    )
                )
        for one in found[1:]:
            assert torch.equal(torch.cat(one.logits), torch.cat(found[0].logits))


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_lm_head_is_decoded(tmp_path, seed, tied):
    plain = write_checkpoint(
        tmp_path / "plain", "qwen3_moe", **SIZES, vocab_size=96, tie_word_embeddings=tied
    )
    tensors = load_file(plain / "model.safetensors")
    name = "model.embed_tokens" if tied else "lm_head"
    row = E4M3.with_scales("bf16", (1, 0))
    weight = tensors.pop(f"{name}.weight")
    parts = draw(row, *weight.shape, torch.Generator().manual_seed(seed))
    numbers = row.dequantise(parts).float()
    folders = []
    for kind, more in (
        ("decoded", {f"{name}.weight": numbers}),
        ("packed", {f"{name}.weight": parts[VALUES], f"{name}.weight_scale": parts[SCALES]}),
    ):
        folders.append(tmp_path / kind)
        shutil.copytree(plain, folders[-1])
        save_file(tensors | more, folders[-1] / "model.safetensors", metadata={"format": "pt"})
    config = folders[1] / "config.json"
    described = json.loads(config.read_text()) | {"quantization_config": TENSORS}
    config.write_text(json.dumps(described))
    model = moeinf.load(folders[1], device="cpu", dtype=torch.float32, slots=4, dense="packed")
    assert isinstance(model.lm_head, PackedLinear) is not tied
    found, expected = logits(folders[1], dense="packed"), logits(folders[0])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_nan_in_a_packed_layer_is_refused_when_it_is_loaded(plain, tmp_path, seed):
    packed, _ = quantised(plain, tmp_path, "fp8 channels", seed, which="self_attn")
    name = "model.layers.1.self_attn.q_proj"
    rewrite(packed, lambda tensors: tensors[f"{name}.weight"].view(torch.uint8)[3, 5].fill_(127))
    with pytest.raises(moeinf.ReadError, match=rf"{name}.weight: values: expected finite"):
        moeinf.load(packed, device="cpu", dense="packed")


def stated_by_modelopt(folder: Path, quantization: object) -> None:
    """Moves what config.json says of the weights into the file of ModelOpt."""
    described = json.loads((folder / "config.json").read_text())
    described.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(described))
    told = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))


@pytest.mark.parametrize("which", [".experts.", "_proj"])
def test_modelopt_may_state_the_format_in_a_file_of_its_own(plain, tmp_path, seed, which):
    packed, decoded = quantised(plain, tmp_path, "nvfp4", seed, which)
    algo = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*router*"]}
    stated_by_modelopt(packed, algo)
    found, expected = logits(packed), logits(decoded)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_file_of_modelopt_that_the_tensors_contradict_is_refused(plain, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(plain, folder)
    stated_by_modelopt(folder, {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    moeinf.load(folder, device="cpu", dtype=torch.float32, slots=4)
    stated_by_modelopt(folder, {"quant_algo": "NVFP4"})
    with pytest.raises(moeinf.CheckpointError, match="expected tensors with scales, found none"):
        moeinf.load(folder, device="cpu")
    stated_by_modelopt(folder, "NVFP4")
    with pytest.raises(moeinf.CheckpointError, match=r"hf_quant_config\.json: quantization is"):
        moeinf.load(folder, device="cpu")


def test_a_model_with_packed_experts_is_not_saved(plain, tmp_path):
    packed, _ = quantised(plain, tmp_path, "mxfp4", 0)
    model = moeinf.load(packed, device="cpu", slots=4)
    with pytest.raises(UnsupportedError, match="expected experts without scales; copy the files"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
    "sliding_window": 8,
}


def test_gpt_oss(tmp_path, seed):
    """Fused, rows of gate and up in turn, biases; the module's own parameters are transposed."""
    plain = write_checkpoint(tmp_path / "plain", "gpt_oss", **{**SIZES, **GPT_OSS})
    rng = torch.Generator().manual_seed(seed)
    row = E2M1.with_scales("e8m0", (1, 32))
    packed, decoded = {}, {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            packed[key] = decoded[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        parts = [draw(row, outputs, inputs, rng) for _ in range(experts)]
        values = torch.stack([part[VALUES] for part in parts])
        packed[f"{key}_blocks"] = values.view(experts, outputs, inputs // 32, 16)
        packed[f"{key}_scales"] = torch.stack([part[SCALES] for part in parts])
        numbers = torch.stack([row.dequantise(part).float() for part in parts])
        decoded[key] = numbers.transpose(1, 2).contiguous()
    shutil.copytree(plain, tmp_path / "packed")
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "packed" / "config.json"
    described = json.loads(config.read_text())
    described["quantization_config"] = {"quant_method": "mxfp4"}
    config.write_text(json.dumps(described))
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(tokens).logits
        model = moeinf.load(tmp_path / "packed", device="cpu", dtype=torch.float32, slots=3)
        found = model(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert ExpertStore.open(tmp_path / "packed").layout == model.moeinf.cache.store.layout


def rewrite(folder: Path, change: Callable[[Parts], None], **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(described))


DOWN = "model.layers.0.mlp.experts.0.down_proj"


@pytest.mark.parametrize(
    ("name", "end", "tensor", "config", "error", "message"),
    [
        ("fp8 blocks", "", None, {"quant_method": "hqq"}, UnsupportedError,
         "stored as 'hqq'; supported are fp8, mxfp8, mxfp4"),
        ("fp8 blocks", ".weight_scale_inv", torch.ones(2, 2), {}, CheckpointError,
         r"weight_scale_inv.*expected a scale for each 32 x 32 or 1 x 32 block"),
        ("fp8 blocks", "", None, {"weight_block_size": [64, 64]}, CheckpointError,
         "expected a scale for each 64 x 64"),
        ("fp8 channels", ".weight_scale", torch.ones(64, 1, dtype=torch.int64), {},
         CheckpointError, "expected scales of F32"),
        ("int4", ".weight_zero_point", torch.zeros(7, 3, dtype=torch.int32), {}, CheckpointError,
         r"weight_zero_point.*expected I8 \[64, 3\] or I32 \[8, 3\]"),
        ("fp8 channels", ".weight_zero_point", torch.zeros(64, 1, dtype=torch.int8), {},
         UnsupportedError, "zero points are supported of integers"),
        ("gptq", ".g_idx", torch.arange(96, dtype=torch.int32) % 3, {}, UnsupportedError,
         r"g_idx.*desc_act.*expected input 1 in group 0, found 1"),
        ("gptq", ".g_idx", torch.zeros(95, dtype=torch.int32), {}, CheckpointError,
         r"g_idx.*expected I32 \[96\]"),
        ("awq", "", None, {"desc_act": True}, UnsupportedError, "desc_act is true"),
        ("gptq", "", None, {"checkpoint_format": "marlin"}, UnsupportedError,
         "checkpoint_format is 'marlin', expected gptq or gptq_v2"),
        ("awq", "", None, {"version": "gemv"}, UnsupportedError, "version is 'gemv'"),
        ("gptq of auto-round", "", None, {"packing_format": "auto_round"}, UnsupportedError,
         "packing_format is 'auto_round', expected auto_round:auto_gptq"),
        ("gptq", ".qzeros", torch.zeros(2, 8, dtype=torch.int32), {}, CheckpointError,
         r"qzeros.*expected I32 \[3, 8\]"),
        ("gptq", ".qweight", torch.zeros(13, 64, dtype=torch.int32), {}, CheckpointError,
         "expected groups of a size that divides 104 inputs"),
        ("awq", ".qweight", torch.zeros(96, 6, dtype=torch.int32), {}, UnsupportedError,
         "expected integers of 4 bits"),
        ("gptq", ".scales", torch.ones(3, 64, dtype=torch.int32), {}, CheckpointError,
         "expected qzeros and scales of F16"),
        ("nvfp4", ".pre_quant_scale", torch.ones(96), {}, UnsupportedError,
         "scales of the inputs are not supported"),
        ("nvfp4", ".weight_scale_2", torch.tensor(-1.0), {}, CheckpointError,
         "expected a number above zero, found -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(
    plain, tmp_path, name, end, tensor, config, error, message
):
    packed, _ = quantised(plain, tmp_path, name, 0)
    rewrite(packed, lambda tensors: tensors.update({DOWN + end: tensor} if end else {}), **config)
    with pytest.raises(error, match=message):
        _ = ExpertStore.open(packed).catalog


def test_a_configuration_of_scales_that_no_tensor_has_is_refused(plain, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(plain, folder)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = FP8
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="expected tensors with scales, found none"):
        ExpertStore.open(folder)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("by_columns", [False, True])
def test_fused_nvfp4_with_a_number_for_each_expert(tmp_path, seed, apart, by_columns):
    """`apart`: gate and up have numbers of their own. `by_columns`: as ModelOpt writes experts that
    the module holds so."""
    family = "gpt_oss" if by_columns else "qwen3_moe"
    sizes = GPT_OSS if by_columns else {}
    plain = write_checkpoint(tmp_path / "plain", family, original_names=False, **{**SIZES, **sizes})
    rng = torch.Generator().manual_seed(seed)
    row = E2M1.with_scales("e4m3", (1, 16), multiplier=True)
    packed, decoded = {}, {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if not key.endswith(("gate_up_proj", "down_proj")) or tensor.dim() != 3:
            packed[key] = decoded[key] = tensor
            continue
        matrices = tensor.transpose(1, 2) if by_columns else tensor
        experts, outputs, inputs = matrices.shape
        parts = [draw(row, outputs, inputs, rng) for _ in range(experts)]
        numbers = torch.stack([part[MULTIPLIER] for part in parts])
        if apart and key.endswith("gate_up_proj"):
            numbers = torch.cat([numbers, 2 * numbers], 1)
        values, scales = (torch.stack([part[p] for part in parts]) for p in (VALUES, SCALES))
        if by_columns:
            values, scales = values.transpose(1, 2), scales.transpose(1, 2)
        packed[key] = values.contiguous()
        packed[f"{key}_weight_scale"] = scales.contiguous()
        packed[f"{key}_weight_scale_2"] = numbers if numbers.shape[1] > 1 else numbers[:, 0].clone()
        packed[f"{key}_input_scale"] = torch.ones(experts)
        dense = torch.stack([row.dequantise(part).float() for part in parts])
        if numbers.shape[1] > 1:
            up = slice(1, None, 2) if by_columns else slice(outputs // 2, None)
            dense[:, up] *= 2
        decoded[key] = (dense.transpose(1, 2) if by_columns else dense).contiguous()
    shutil.copytree(plain, tmp_path / "packed")
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    found, expected = logits(tmp_path / "packed"), logits(plain)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4

"""GGUF files: what llama.cpp and Ollama users have, served as it is stored."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Kind  # noqa: E402
from gguf_files import FAMILIES, write_gguf  # noqa: E402
from hub_server import NAME, hub_of  # noqa: E402
from test_hub import be_the_hub  # noqa: E402

import moeinf  # noqa: E402
from moeinf.checkpoint.blocks import BLOCKS, NUMBERS  # noqa: E402
from moeinf.checkpoint.formats import FORMATS  # noqa: E402
from moeinf.checkpoint.gguf import TYPES, read_gguf  # noqa: E402
from moeinf.errors import CheckpointError, UnsupportedError  # noqa: E402
from moeinf.experts.packed_linear import PackedLinear  # noqa: E402
from moeinf.integrations.transformers.generation import read_tokenizer  # noqa: E402

ROWS = [Kind.F16, Kind.BF16, *(Kind[name.upper()] for name in BLOCKS)]
# Rows of 256 columns are whole blocks of every format.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def difference(model, expected, seed: int) -> float:
    """Largest difference of logits, as a share of the largest logit."""
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(seed))
    wanted = logits(expected, ids)
    return float((logits(model, ids) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_serves_every_architecture(tmp_path: Path, seed: int, architecture: str) -> None:
    """Configuration, names and orders are those of the model that was converted."""
    expected = write_gguf(tmp_path / "model.gguf", architecture, seed=seed)
    model = moeinf.load(tmp_path / "model.gguf", device="cpu")
    assert type(model).__name__ == type(expected).__name__
    assert difference(model, expected, seed) < 1e-4


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.name)
def test_serves_every_type_of_experts(tmp_path: Path, seed: int, kind: Kind) -> None:
    """Experts stay as they are in the file; the rest becomes what the model computes in."""
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, seed=seed, experts=kind, dense=kind, **WIDE)
    model = moeinf.load(path, device="cpu", dtype=torch.float32)
    store = model.moeinf.cache.store
    assert store.layout.down.format.name == kind.name.lower()
    layer = read_gguf(path).tensors["blk.0.ffn_down_exps.weight"]
    assert store.layout["down"].nbytes == layer.nbytes // store.num_experts
    assert difference(model, expected, seed) < 1e-4
    packed = moeinf.load(path, device="cpu", dtype=torch.float32, dense="packed")
    assert difference(packed, expected, seed) < 1e-4
    in_blocks = kind.name.lower() in BLOCKS
    assert isinstance(packed.model.layers[0].self_attn.q_proj, PackedLinear) is in_blocks


@pytest.mark.parametrize("architecture", FAMILIES)
def test_packed_layers_of_every_architecture(tmp_path: Path, seed: int, architecture: str) -> None:
    """The weights that the converter puts into another order are float32 here."""
    kinds = dict.fromkeys(("attn_qkv", "attn_gate", "ssm_", "norm", "gate_inp"), Kind.F32)
    expected = write_gguf(
        tmp_path / "model.gguf", architecture, seed=seed, dense=Kind.Q8_0, kinds=kinds
    )
    model = moeinf.load(tmp_path / "model.gguf", device="cpu", dtype=torch.float32, dense="packed")
    assert any(isinstance(one, PackedLinear) for one in model.modules())
    assert difference(model, expected, seed) < 1e-4


def test_formats_differ_between_layers_and_matrices(tmp_path: Path, seed: int) -> None:
    """As in Q4_K_M files: some layers have their down in Q6_K. Others mix gate and up too."""
    path, kinds = tmp_path / "model.gguf", {"blk.1.ffn_down": Kind.Q6_K, "blk.2": Kind.Q8_0}
    kinds |= {"blk.0.ffn_up": Kind.Q5_K, "blk.0.ffn_down": Kind.BF16}
    kinds = {"norm": Kind.F32, "gate_inp": Kind.F32, **kinds}
    expected = write_gguf(path, seed=seed, experts=Kind.Q4_K, kinds=kinds, **WIDE)
    model = moeinf.load(path, device="cpu", dtype=torch.float32)
    formats = {cache.store.layout.format_names for cache in model.moeinf.caches}
    assert formats == {"q4_k, q5_k, bf16", "q4_k, q6_k", "q8_0"}
    assert difference(model, expected, seed) < 1e-4
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(seed))
    few = moeinf.load(path, device="cpu", dtype=torch.float32, memory="30%")
    assert torch.equal(logits(few, ids), logits(model, ids))


def test_bits_do_not_depend_on_the_budget_or_the_policy(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed, experts=Kind.Q4_K, dense=Kind.Q6_K, **WIDE)
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(seed))
    wanted = logits(moeinf.load(path, device="cpu"), ids)
    for options in ({"slots": 2}, {"slots": 5, "policy": "lru"}, {"memory": "50%"}):
        found = logits(moeinf.load(path, device="cpu", **options), ids)
        assert torch.equal(found, wanted), options


def test_the_same_logits_as_transformers(tmp_path: Path, seed: int) -> None:
    """Which decodes every expert at load, and takes the width of experts from its own default."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed, experts=Kind.Q8_0, dense=Kind.Q8_0, moe_intermediate_size=768)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model = moeinf.load(path, device="cpu", dtype=torch.float32)
    assert difference(model, expected, seed) < 1e-4


def test_it_is_planned_with_and_not_packed(tmp_path: Path, seed: int) -> None:
    from moeinf.checkpoint.folder import Checkpoint
    from moeinf.planning.model import read_model

    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed, experts=Kind.Q8_0)
    costs = read_model(Checkpoint.open(path))
    assert list(costs.layouts()) == [costs.stores[0].layout.down.format.name]
    with pytest.raises(UnsupportedError, match="expected safetensors files, found a GGUF file"):
        moeinf.pack(path, tmp_path / "pack")


def test_split_files(tmp_path: Path, seed: int) -> None:
    """Any part names the model; what is missing is named."""
    expected = write_gguf(tmp_path / "model.gguf", seed=seed, parts=3, experts=Kind.Q8_0)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    for part in (parts[0], parts[2]):
        model = moeinf.load(part, device="cpu", dtype=torch.float32)
        assert difference(model, expected, seed) < 1e-4
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf: missing"):
        moeinf.load(parts[0])


def test_a_folder_or_a_file_on_the_hub(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of one model, also with a projector of images; and a split file of a repository."""
    folder = tmp_path / "files"
    folder.mkdir()
    expected = write_gguf(folder / "model.gguf", seed=seed, parts=2, experts=Kind.Q8_0)
    (folder / "mmproj-model.gguf").write_bytes(b"an image projector")
    model = moeinf.load(folder, device="cpu", dtype=torch.float32)
    assert difference(model, expected, seed) < 1e-4
    with hub_of(folder) as hub:
        be_the_hub(hub, tmp_path, monkeypatch)
        model = moeinf.load(f"{NAME}/model-00001-of-00002.gguf", device="cpu", dtype=torch.float32)
        assert {name for name, sent in hub.sent.items() if sent} == {
            f"model-0000{number}-of-00002.gguf" for number in (1, 2)
        }
    assert difference(model, expected, seed) < 1e-4
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"one GGUF model, found model-.*other\.gguf"):
        moeinf.load(folder)


def test_what_takes_safetensors_refuses_gguf(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed)
    for refused in (
        lambda: moeinf.ExpertStore.open(path),
        lambda: moeinf.pack(path, tmp_path / "packed"),
        lambda: moeinf.load(path, device="cpu").save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(UnsupportedError, match="GGUF file"):
            refused()


def moeinf_command(*arguments: str) -> str:
    command = [sys.executable, "-m", "moeinf.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_tokenizer_and_command_line(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed, experts=Kind.Q4_0)
    tokenizer = read_tokenizer(path)
    ids = tokenizer("hello")["input_ids"]
    assert tokenizer.decode(ids) == "hello" and len(ids) == 4  # "he" is one token
    assert tokenizer.eos_token == "<|end|>"
    shown = moeinf_command("info", str(path))
    assert "q4_0" in shown and "Qwen3Moe" in shown
    ran = moeinf_command("run", str(path), "--prompt", "hello", "--max-new-tokens", "3")
    assert "tokens/s" in ran


@pytest.mark.parametrize("name", BLOCKS)
def test_decoders_are_those_of_the_gguf_package(seed: int, name: str) -> None:
    """All bytes of codes and of scales; the numbers of a block that are float16 stay finite."""
    kind, (_, size, decode) = Kind[name.upper()], BLOCKS[name]
    raw = np.random.default_rng(seed).integers(0, 256, (200, size), dtype=np.uint8)
    halves = [place for place, kind in NUMBERS[name] if kind == "f16"]
    for first in halves:
        raw[:, first + 1] &= 0xBF  # no infinity, no NaN
    if name == "mxfp4":
        raw[:, 0] = np.arange(200)
    wanted = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(decode(torch.from_numpy(raw)).float().numpy(), wanted)
    assert FORMATS[name].unit == size


def test_sizes_of_types_are_those_of_the_gguf_package() -> None:
    for number, (name, elements, size) in TYPES.items():
        assert Kind(number).name == name
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (elements, size)


# --- files that are refused -------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    keys: bytes = text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe"),
    pairs: int = 1,
    version: int = 3,
    data: int = 1024,
    count: int | None = None,
) -> bytes:
    """A file by hand: tensors are name, sizes (innermost first), type and offset."""
    raw = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if count is None else count, pairs)
    raw += keys
    for name, sizes, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(data)


GOOD = ("a", (32, 8), 8, 0)
BAD = {
    "not a GGUF file": (b"PK\3\4" + bytes(100), "begins with b'GGUF', found b'PK"),
    "too short": (b"GGUF\3\0", "the version takes 4 bytes from byte 4, the file has 2 more"),
    "version": (header([GOOD], version=1), "GGUF version 1, expected 2 or 3"),
    "big endian": (header([GOOD], version=3 << 24), "with the lower bytes first"),
    "truncated": (header([GOOD], data=100), "bytes 128 to 400 leave the file's 228"),
    "too many tensors": (header([GOOD], count=2**62), "has 0 dimensions, expected 1 to 4"),
    "unknown type": (header([("a", (32,), 99, 0)]), "tensor 'a': type 99 is not known"),
    "removed type": (header([("a", (32,), 4, 0)]), "type 4 is not known"),
    "part of a block": (header([("a", (31, 2), 8, 0)]), "rows of 31 elements are no whole blocks"),
    "huge": (header([("a", (2**32, 2**32, 2), 0, 0)]), "expected a shape of sizes above zero"),
    "empty": (header([("a", (0, 2), 0, 0)]), "expected a shape of sizes above zero"),
    "dimensions": (header([("a", (1,) * 5, 0, 0)]), "has 5 dimensions, expected 1 to 4"),
    "no dimensions": (header([("a", (), 0, 0)]), "has 0 dimensions, expected 1 to 4"),
    "overlap": (header([GOOD, ("b", (32, 8), 8, 256)]), "tensor 'a' and tensor 'b' overlap"),
    "twice": (header([GOOD, ("a", (4,), 0, 512)]), "tensor 'a' is there twice"),
    "odd offset": (header([("a", (4,), 0, 8)]), "offset 8 is no multiple of 32"),
    "offset": (header([("a", (4,), 0, 2**63)]), "leave the file's"),
    "alignment": (
        header([GOOD], text("general.alignment") + struct.pack("<II", 4, 48)),
        "general.alignment is 48, expected a power of two",
    ),
    "key twice": (
        header([GOOD], 2 * (text("x") + struct.pack("<II", 4, 1)), pairs=2),
        "key 'x' is there twice",
    ),
    "long string": (
        header([GOOD], struct.pack("<Q", 2**63)), "a key takes 9223372036854775808 bytes",
    ),
    "long array": (
        header([GOOD], text("x") + struct.pack("<IIQ", 9, 6, 2**61)), "'x' takes",
    ),
    "many strings": (
        header([GOOD], text("x") + struct.pack("<IIQ", 9, 8, 2**61)), "more than the file has room",
    ),
    "arrays of arrays": (
        header([GOOD], text("x") + struct.pack("<IIQ", 9, 9, 1)), "an array of type 9",
    ),
    "type of a key": (header([GOOD], text("x") + struct.pack("<I", 13)), "type 13"),
    "no bool": (header([GOOD], text("x") + struct.pack("<IB", 7, 2)), "neither true nor false"),
    "no UTF-8": (header([GOOD], struct.pack("<Q", 1) + b"\xff"), "is not UTF-8"),
    "architecture": (
        header([GOOD], text("general.architecture") + struct.pack("<II", 4, 1)),
        "general.architecture is 1, expected a name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    raw, message = BAD[name]
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        moeinf.load(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(error.value) and message in str(error.value)


def test_mutated_headers(tmp_path: Path, seed: int) -> None:
    """A damaged header is refused, or what it says lies in the file and nothing lies in two
    tensors: never another error, and never long."""
    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed, experts=Kind.Q8_0)
    whole = path.read_bytes()
    end = min(entry.offset for entry in read_gguf(path).tensors.values())
    rng, refused = random.Random(seed), 0
    for _ in range(2000):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(min(end, max(1, len(raw))))
            what = rng.randrange(4)
            if what == 0 and at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                raw[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**32, 2**63, 2**64 - 1)))
            elif what == 2:
                del raw[at : at + rng.randrange(1, 40)]
            else:
                del raw[rng.choice((at, end + at, len(raw) - at)) :]
        path.write_bytes(raw)
        try:
            entries = sorted(read_gguf(path).tensors.values(), key=lambda entry: entry.offset)
        except (CheckpointError, UnsupportedError):
            refused += 1
            continue
        last = 0
        for entry in entries:
            assert last <= entry.offset and entry.offset + entry.nbytes <= len(raw)
            last = entry.offset + entry.nbytes
    assert refused > 1000


def test_what_no_model_can_be_made_of_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"architecture 'mamba'; moeinf serves.*qwen3moe"):
        moeinf.load(path)
    write_gguf(path, experts=Kind.TQ2_0, **WIDE)
    with pytest.raises(UnsupportedError, match=r"TQ2_0.*expected F32, F16, BF16 or one of Q8_0"):
        moeinf.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        moeinf.load(tmp_path / "absent.gguf")


def test_a_key_or_a_tensor_that_is_missing_is_named(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, seed=seed)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn_mron.weight"))
    with pytest.raises(CheckpointError, match=r"post_attention_layernorm\.weight"):
        moeinf.load(path)
    path.write_bytes(whole.replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_up_exps.wieght"))
    with pytest.raises(CheckpointError, match="no tensor for its up"):
        moeinf.load(path)
    path.write_bytes(whole.replace(b"qwen3moe.expert_count", b"qwen3moe.expert_conut"))
    with pytest.raises(CheckpointError, match="expert"):
        moeinf.load(path)

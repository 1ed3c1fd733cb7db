"""A safetensors header is checked as strictly as the safetensors library checks it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from moeinf.checkpoint.folder import read_tensor
from moeinf.checkpoint.headers import DTYPES, read_header
from moeinf.errors import CheckpointError

Header = dict[str, Any]

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def file_of(header: Header | str | bytes, data_bytes: int) -> bytes:
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def library_takes(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def refusal(path: Path, content: bytes) -> str | None:
    """What our reader says against a file; None if it takes the file and knows every dtype."""
    path.write_bytes(content)
    try:
        for entry in read_header(path).values():
            if entry.bits is None:
                entry.torch_dtype()
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return str(error)
    return None


def tensor(dtype: str, shape: list[int], begin: int, nbytes: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_the_library_has_its_size(dtype: str, tmp_path: Path) -> None:
    header = {"x": tensor(dtype, [2, 4], 0, BITS[dtype])}
    content = file_of(header, BITS[dtype])
    assert library_takes(content)
    assert refusal(tmp_path / "x", content) is None
    assert read_header(tmp_path / "x")["x"].bits == BITS[dtype]
    for wrong in (BITS[dtype] - 1, BITS[dtype] + 1):
        header = {"x": tensor(dtype, [2, 4], 0, wrong)}
        assert "takes" in (refusal(tmp_path / "x", file_of(header, wrong)) or "")


def test_no_dtype_is_missing_or_made_up() -> None:
    assert {name: bits for name, (bits, _) in DTYPES.items()} == BITS


A, B, C = tensor("F32", [2], 0, 8), tensor("F32", [3], 8, 12), tensor("U8", [4], 20, 4)
NAMES = {"a": A, "b": B, "c": C}


@pytest.mark.parametrize(
    "header, data_bytes, message",
    [
        ({"a": A, "c": C}, 24, "'a' and tensor 'c' leave a hole between them: one ends at byte 8"),
        ({"b": B, "c": C}, 24, "the header and tensor 'b' leave a hole"),
        ({**NAMES, "d": tensor("U8", [8], 4, 8)}, 24, "tensor 'a' and tensor 'd' overlap"),
        ({**NAMES, "d": tensor("U8", [0], 5, 0)}, 24, "tensor 'a' and tensor 'd' overlap"),
        (NAMES, 25, "1 bytes after the last tensor belong to none"),
        (NAMES, 23, r"bytes 20 to 24 leave the file's 23 bytes"),
        ({"a": A | {"data_offsets": [8, 0]}}, 8, "bytes 8 to 0 leave"),
        ({"a": tensor("U8", [2**32, 2**32], 0, 0)}, 0, "more bits than a 64-bit number"),
        ({"a": tensor("U8", [2**63, 4, 0], 0, 0)}, 0, "more bits than a 64-bit number"),
        ({"a": tensor("F64", [2**60], 0, 0)}, 0, "more bits than a 64-bit number"),
        ({"a": tensor("U8", [2**64], 0, 0)}, 0, "not a list of sizes"),
        ({"a": tensor("F4", [3], 0, 1)}, 1, "takes 12 bits, not whole bytes"),
        ({"a": tensor("F6_E2M3", [2, 3], 0, 5)}, 5, "takes 36 bits, not whole bytes"),
        ({"a": tensor("F4", [4], 0, 4)}, 4, "takes 2 bytes, its offsets span 4"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ 'a' is a int, expected a string"),
        ({"__metadata__": [1]}, 0, "__metadata__ is a list, expected an object"),
        ('{"a":' + json.dumps(A) + ',"a":' + json.dumps(A) + "}", 8, "key 'a' is there 2 times"),
        ('{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', 0, "'dtype' is"),
        ('{"__metadata__":{"x":"1","x":"2"}}', 0, "key 'x' is there 2 times"),
        ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}', 0, "not a pair of offsets"),
        ('{"a":{"dtype":"U8","shape":[0]}}', 0, "expected the fields dtype, shape, data_offsets"),
        ({"a": {**A, "scale": 1}}, 8, "found dtype, shape, data_offsets, scale"),
        ('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "not JSON"),
        (b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "not JSON"),
        ("{}".encode("utf-16-le"), 0, "not JSON"),
        ("\ufeff{}", 0, "expected '{', found b'\\\\xef'"),
        (" {}", 0, "expected '{', found b' '"),
        ("", 0, "expected '{', found b''"),
        ("[]", 0, r"expected '{', found b'\['"),
        ("{}x", 0, "not JSON"),
        ('{"a":' * 100_000, 0, "not JSON"),
    ],
)
def test_a_header_that_is_refused(
    header: Header | str | bytes, data_bytes: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, data_bytes))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        read_header(path)


def test_a_header_above_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="header length 100000001 goes beyond"):
        read_header(path)


def test_headers_that_are_unusual_and_valid(tmp_path: Path) -> None:
    for header, data_bytes in (
        ({}, 0),
        ('{"__metadata__":null}  \n', 0),
        ({"c": C, "b": B, "a": A, "e": tensor("U8", [0, 7], 8, 0)}, 24),
        ({"scalar": tensor("F32", [], 0, 4)}, 4),
        ('{"\\ud83d\\ude00":{"shape":[1],"data_offsets":[0,1],"dtype":"U8"}}', 1),
    ):
        content = file_of(header, data_bytes)
        assert library_takes(content)
        assert refusal(tmp_path / "x", content) is None


def test_an_unknown_dtype_is_refused_when_its_tensor_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": A, "b": tensor("F12", [8], 8, 12), "c": C}, 24))
    entries = read_header(path)
    assert torch.equal(read_tensor(entries["a"]), torch.zeros(2))
    for name in ("b",):
        with pytest.raises(CheckpointError, match=r"safetensors: tensor 'b': .*found F12"):
            read_tensor(entries[name])


# What the library takes and this reader refuses, and why.
STRICTER = {
    # The format says that the header begins with "{". The library lets white space come first.
    "expected '{'": "white space before the header",
    # The library keeps the last of two tensors of one name. Which one was meant is not known.
    "times": "a name that is there twice",
    # A derived decoder takes an entry as a list of its fields. The format says: an object.
    "its entry is a list": "an entry that is a list",
    # The same decoder takes {"F32": null} for "F32".
    "is not a name": "a dtype that is an object",
    # The library ignores fields that it does not know. They might say how to read the bytes.
    "expected the fields": "a field that the format has not",
}


def random_header(draw: random.Random) -> tuple[Header, int]:
    header: Header = {"__metadata__": {"format": "pt"}} if draw.random() < 0.5 else {}
    offset = 0
    for index in range(draw.randint(1, 5)):
        dtype = draw.choice(list(BITS))
        shape = [draw.choice([0, 1, 2, 3, 4, 8]) for _ in range(draw.randint(0, 3))]
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [4, 2], BITS[dtype] * 8
        header[f"t{index}"] = tensor(dtype, shape, offset, bits // 8)
        offset += bits // 8
    items = list(header.items())
    draw.shuffle(items)
    return dict(items), offset


ODD = (-1, 0, 1, 2, 7, 8, 2**31, 2**32, 2**60, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, -0.0, True,
       None, "", "4", [], [1], {}, {"F32": None})  # fmt: skip


def change_a_value(draw: random.Random, header: Header) -> None:
    """Replaces one value, at any depth, by an odd one or by one that is near."""
    holder: Any = header
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or draw.random() < 0.1:
            break
        holder = holder[key]
    value = holder[key]
    if type(value) is int and draw.random() < 0.6:
        holder[key] = value + draw.choice([-8, -4, -1, 1, 4, 8])
    elif key == "dtype" and draw.random() < 0.7:
        holder[key] = draw.choice([*BITS, "F12", "f32", "", "F4 "])
    else:
        holder[key] = copy.deepcopy(draw.choice(ODD))


def change_structure(draw: random.Random, header: Header) -> None:
    """Adds, removes, renames or reorders a field, a size or a tensor."""
    name = draw.choice(list(header))
    fields = header[name]
    kind = draw.randrange(7)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header["new"] = copy.deepcopy(fields)
    elif kind == 2 and isinstance(fields, dict) and fields:
        del fields[draw.choice(list(fields))]
    elif kind == 3 and isinstance(fields, dict):
        fields[draw.choice(["extra", "Shape"])] = copy.deepcopy(draw.choice(ODD))
    elif kind == 4 and isinstance(fields, dict):
        header[name] = list(fields.values())
    elif kind == 5 and isinstance(fields, dict) and isinstance(fields.get("shape"), list):
        fields["shape"].append(copy.deepcopy(draw.choice(ODD)))
    elif kind == 6:
        header["__metadata__"] = draw.choice([None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": None}])


def change_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flips, drops, repeats or inserts bytes, mostly in the header."""
    length = len(content)
    at = draw.randrange(min(length, 8 + 400))
    kind = draw.randrange(5)
    if kind == 0:
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content + bytes(draw.randint(1, 9))
    header_bytes = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + header_bytes], content[8 + header_bytes :]
    at = draw.randrange(len(text))
    if kind == 3:
        end = min(len(text), at + draw.randint(1, 60))
        text = text[:end] + text[at:end] + text[end:]
    else:
        odd = draw.choice([b" ", b"\n", b"\0", b"\xff", b"\\ud800", b"-", b"1e2", b"9" * 30, b","])
        text = text[:at] + odd + text[at:]
    return len(text).to_bytes(8, "little") + text + data


def test_what_the_library_refuses_is_refused(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    refused = taken = 0
    for _ in range(6000):
        header, data_bytes = random_header(draw)
        changes: list[Callable[[random.Random, Header], None]] = [change_a_value, change_structure]
        for _ in range(draw.choice([0, 1, 1, 2])):
            if header:
                draw.choice(changes)(draw, header)
        content = file_of(header, data_bytes)
        if draw.random() < 0.4:
            content = change_bytes(draw, content)
        said = refusal(tmp_path / "x", content)
        if library_takes(content):
            taken += 1
            if said is not None:
                assert any(reason in said for reason in STRICTER), (said, content)
        else:
            refused += 1
            assert said is not None, content
    assert refused > 1500 and taken > 1000  # both sides were tried

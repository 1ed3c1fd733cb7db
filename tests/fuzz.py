"""Random damage to headers, traces and configurations: never a crash, a hang or a wrong load.

    python tests/fuzz.py --headers 100000 --traces 100000 --configs 10000 --seed 1

A safetensors header: moeinf and the safetensors library take the same files, and find the same
tensors in them. A trace or collection: read as it was written, or refused by TraceError. A
configuration: a store of experts whose bytes are those of the files, or CheckpointError.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moeinf.checkpoint.headers import DTYPES, read_header
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, TraceError, UnsupportedError
from moeinf.pocket import POCKET
from moeinf.traces.eam import EAMC
from moeinf.traces.trace import Trace

SECONDS = 5.0  # of processor time that one case may take
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # ten times as fast as a disk
MEMORY = 8 << 30  # bytes of addresses that all of them may take
SCALARS: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 3, 7, 8, 255, 2**31, 2**63, 2**64 - 1, 2**64, 10**400, 0.5, -0.0,
    1e308, "", "a", "F32", "BF16", "I64", "F4", "é", "\ud800", [], [0], [0, 0], [2, 4], [1] * 9,
    {}, {"a": 1},
)  # fmt: skip


def damage(value: Any, draw: random.Random) -> Any:
    """The same JSON value with one part of it changed, added or left out."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        changed = dict(value)
        if (what := draw.random()) < 0.1:
            del changed[key]
        elif what < 0.2:
            changed[str(draw.choice(SCALARS))] = draw.choice([value[key], *SCALARS])
        elif what < 0.25:
            other = draw.choice(sorted(value))
            changed[key], changed[other] = changed[other], changed[key]
        else:
            changed[key] = damage(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], damage(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and draw.random() < 0.7:
        return value + draw.choice([1, -1, 4, -4, 8, 2**32])
    return draw.choice(SCALARS)


def scratch(raw: bytes, draw: random.Random) -> bytes:
    """The same bytes with some overwritten, cut out, repeated or added."""
    place = draw.randrange(len(raw) + 1)
    some = draw.randbytes(draw.randint(1, 9))
    match draw.randrange(6):
        case 0:
            return raw[:place]
        case 1:
            return raw[:place] + some + raw[place:]
        case 2:
            return raw[:place] + raw[place + len(some) :]
        case 3:
            return raw[:place] + some + raw[place + len(some) :]
        case 4:
            return raw + some
        case _:
            length = draw.choice([0, 1, 7, len(raw), len(raw) + 1, 2**31, 2**63, 2**64 - 1])
            return length.to_bytes(8, "little") + raw[8:]


def a_file(draw: random.Random) -> tuple[dict[str, Any], int]:
    """A good header of a few tensors, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    end = 0
    for number in range(draw.randint(0, 4)):
        dtype = draw.choice(sorted(DTYPES))
        shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 3))]
        if DTYPES[dtype][0] < 8:
            shape.append(8)
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype][0] // 8
        header[f"t{number}"] = {
            "dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]
        }  # fmt: skip
        end += nbytes
    if draw.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    return header, end


def fuzz_header(file: Path, draw: random.Random) -> str:
    header, nbytes = a_file(draw)
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        header = damage(header, draw)
    text = json.dumps(header, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")
    raw = len(text).to_bytes(8, "little") + text + draw.randbytes(nbytes)
    file.write_bytes(scratch(raw, draw) if draw.random() < 0.4 else raw)
    theirs: dict[str, Any] | None = None
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            theirs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        said = str(error)
    try:
        ours = {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()}
    except CheckpointError as error:
        assert str(file) in str(error)
        stricter = "expected the fields" in str(error)  # the library ignores a field of no meaning
        assert theirs is None or stricter, f"refused what safetensors takes: {error}"
        return "refused"
    if theirs is None:  # a dtype that is not known is an error only where its tensor is wanted
        assert any(dtype not in DTYPES for dtype, _ in ours.values()), f"safetensors says: {said}"
        return "with an unknown dtype"
    assert ours == theirs
    return "read"


def fuzz_trace(file: Path, draw: random.Random) -> str:
    tokens, layers, top_k, experts = (draw.randint(1, n) for n in (6, 3, 3, 5))
    maker = np.random.default_rng(draw.randrange(2**32))
    ids = np.stack(
        [
            [maker.permutation(max(experts, top_k))[:top_k] for _ in range(layers)]
            for _ in range(tokens)
        ]
    )
    trace = Trace.from_arrays(
        ids,
        num_experts=max(experts, top_k),
        weights=maker.random(ids.shape) if draw.random() < 0.5 else None,
        model="m",
    )
    kind: Any = Trace
    if draw.random() < 0.3:
        kind = EAMC
        EAMC.from_traces([trace]).save(file)
    else:
        trace.save(file)
    raw = file.read_bytes()
    if draw.random() < 0.5:
        length = int.from_bytes(raw[:8], "little")
        header = damage(json.loads(raw[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
        raw = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    else:
        raw = scratch(raw, draw)
    file.write_bytes(raw)
    try:
        found = kind.load(file)
    except TraceError as error:
        assert file.name in str(error)
        return "refused"
    if isinstance(found, Trace):  # every check of the constructor holds
        assert found.experts.max(initial=-1) < found.num_experts
        assert found.info()["tokens"] == found.num_tokens
    return "read"


def fuzz_config(file: Path, draw: random.Random) -> str:
    """`file` is the config.json of a copy of the built-in model."""
    config = json.loads((POCKET / "config.json").read_text())
    for _ in range(draw.choice([1, 1, 2, 3])):
        config = damage(config, draw)
    raw = json.dumps(config).encode("utf-8", "surrogatepass")
    file.write_bytes(scratch(raw, draw) if draw.random() < 0.2 else raw)
    good = ExpertStore.open(POCKET)
    try:
        found = ExpertStore.open(file.parent)
    except (CheckpointError, UnsupportedError) as error:
        assert str(file.parent) in str(error) or "safetensors" in str(error)
        return "refused"
    assert found.num_experts == good.num_experts
    assert found.num_layers <= good.num_layers  # the configuration may say fewer
    last = found.num_layers - 1
    one, other = found.read(last, 2), good.read(last, 2)
    assert all(one[name].equal(other[name]) for name in other)
    return "read"


FUZZERS: dict[str, Callable[[Path, random.Random], str]] = {
    "headers": fuzz_header,
    "traces": fuzz_trace,
    "configs": fuzz_config,
}


def run(kind: str, count: int, seed: int) -> Counter[str]:
    """What came of `count` cases. A case that fails is named by a seed that repeats it alone."""
    seen = Counter[str]()
    with TemporaryDirectory(dir=SCRATCH) as made:
        folder = Path(made)
        if kind == "configs":
            shutil.copytree(POCKET, folder, dirs_exist_ok=True)
        file = folder / ("config.json" if kind == "configs" else "model.safetensors")
        for number in range(seed, seed + count):
            start = time.process_time()
            try:
                seen[FUZZERS[kind](file, random.Random(number))] += 1
            except Exception as error:
                raise AssertionError(
                    f"--{kind} 1 --seed {number}: {type(error).__name__}: {error}"
                ) from error
            took = time.process_time() - start
            assert took < SECONDS, f"--{kind} 1 --seed {number}: took {took:.1f} s"
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for one in FUZZERS:
        parser.add_argument(f"--{one}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for one in FUZZERS:
        if count := getattr(arguments, one):
            print(one, dict(run(one, count, arguments.seed)), flush=True)

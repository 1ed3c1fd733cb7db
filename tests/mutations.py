"""Good checkpoints, each damaged in one way: served as transformers' eager model is, or refused.

    python tests/mutations.py --count 200 --seed 1

A mutation drops, renames, retypes, reshapes, truncates or swaps a tensor, puts a NaN into it, or
changes a value of config.json. The served model's logits then equal those of transformers on the
same files, or loading is refused by an exception of moeinf whose message names a file or a tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from checkpoints import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.errors import CapacityError, CheckpointError, ReadError, UnsupportedError

REFUSALS = (CheckpointError, UnsupportedError, ReadError, CapacityError)
TOLERANCE = 2e-5  # of float32 logits: transformers adds the experts in another order
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn)
VALUES: tuple[Any, ...] = (None, 0, 1, 3, -1, 7.5, "x", [], True, 100_000)
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))

Tensors = dict[str, torch.Tensor]


def drop(tensors: Tensors, random: random.Random) -> str:
    name = random.choice(sorted(tensors))
    del tensors[name]
    return f"drop {name}"


def rename(tensors: Tensors, random: random.Random) -> str:
    name = random.choice(sorted(tensors))
    parts = name.split(".")
    place = random.randrange(len(parts))
    parts[place] = random.choice([f"{parts[place]}_", "other", str(random.randrange(9))])
    tensors[new := ".".join(parts)] = tensors.pop(name)
    return f"rename {name} to {new}"


def prefix(tensors: Tensors, random: random.Random) -> str:
    new = random.choice(["language_model.", "model.language_model.", "transformer.", "model."])
    for name in list(tensors):
        tensors[new + name] = tensors.pop(name)
    return f"prefix {new}"


def retype(tensors: Tensors, random: random.Random) -> str:
    name, dtype = random.choice(sorted(tensors)), random.choice(DTYPES)
    tensors[name] = tensors[name].to(dtype)
    return f"{name} as {dtype}"


def reshape(tensors: Tensors, random: random.Random) -> str:
    name = random.choice(sorted(tensors))
    old = tensors[name]
    tensors[name] = random.choice(
        [old.flatten(), old[None], old.t() if old.dim() == 2 else old[:, None], old.repeat(2, 1)]
        if old.dim() < 3
        else [old.flatten(), old.transpose(1, 2), old[:1]]
    )
    return f"{name} {list(old.shape)} as {list(tensors[name].shape)}"


def swap(tensors: Tensors, random: random.Random) -> str:
    one, other = random.sample(sorted(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return f"swap {one} and {other}"


def poison(tensors: Tensors, random: random.Random) -> str:
    name = random.choice(sorted(tensors))
    tensors[name].flatten()[random.randrange(tensors[name].numel())] = random.choice(
        [float("nan"), float("inf"), 3e38]
    )
    return f"poison {name}"


def of_tensors(edit: Callable[[Tensors, random.Random], str]) -> Callable[..., str]:
    def mutate(folder: Path, random: random.Random) -> str:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        said = edit(tensors, random)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
        return said

    return mutate


def truncate(folder: Path, random: random.Random) -> str:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    cut = random.choice([0, 7, 8, random.randrange(len(raw)), len(raw) - 1])
    file.write_bytes(raw[:cut])
    return f"truncate to {cut}"


def configure(folder: Path, random: random.Random) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = random.choice(sorted(config))
    old = config[key]
    config[key] = random.choice([value for value in VALUES if value != old])
    if isinstance(old, int) and not isinstance(old, bool) and random.random() < 0.5:
        config[key] = random.choice([old + 1, old - 1, 2 * old])
    if random.random() < 0.2:
        del config[key]
    file.write_text(json.dumps(config))
    return f"config {key}: {old!r} to {config.get(key, 'nothing')!r}"


MUTATIONS: list[Callable[[Path, random.Random], str]] = [
    *map(of_tensors, (drop, rename, retype, reshape, swap, poison, prefix)),
    truncate,
    configure,
    configure,
    configure,
]


@contextlib.contextmanager
def quiet() -> Any:
    """Without the notes and bars of transformers."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def outcome(folder: Path) -> tuple[str, str]:
    """ "equal", "refused", or what is wrong; and the message or the difference."""
    served: Any
    with quiet(), torch.no_grad():
        try:
            served = moeinf.load(folder, slots=5)
            got = served(IDS).logits
        except REFUSALS as error:
            said = str(error)
            if "\n" in said or not any(
                one in said for one in (str(folder), "safetensors", "weight")
            ):
                return "REFUSED WITHOUT A NAME", f"{type(error).__name__}: {said}"
            return "refused", said
        except Exception as error:
            got = error
        try:
            reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
            want = reference.eval()(IDS).logits
        except Exception as error:
            want = error
    if isinstance(got, Exception):
        # A value that loads and then fails in the model's own forward pass fails in both.
        if isinstance(want, Exception) and type(want) is type(got):
            return "fails alike", f"{type(got).__name__}: {got}"
        return "FAILS", f"{type(got).__name__}: {got}; transformers: {str(want)[:200]}"
    if isinstance(want, Exception):
        return "SERVED WHAT TRANSFORMERS REFUSES", f"{type(want).__name__}: {want}"
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return "DIFFERENT", f"{list(got.shape)} {int(got.isnan().sum())} NaN, {list(want.shape)}"
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(0.0), want[~finite].nan_to_num(0.0)):
        return "DIFFERENT", "in where infinity is"
    apart = (got - want)[finite].double().abs().amax(None).item() if finite.any() else 0.0
    scale = want[finite].double().abs().amax(None).item() if finite.any() else 0.0
    if apart > TOLERANCE * max(1.0, scale):
        return "DIFFERENT", f"by {apart}"
    return "equal", f"within {apart}"


def run(count: int, seed: int, report: Callable[[str], None]) -> list[str]:
    """What went wrong in `count` mutations, one line each."""
    draw = random.Random(seed)
    wrong, seen = [], Counter[str]()
    with TemporaryDirectory() as made:
        families = sorted(FAMILIES)
        for number in range(count):
            family, fused = families[number % len(families)], draw.random() < 0.3
            good = Path(made) / f"{family}-{fused}"
            if not good.exists():
                with quiet():
                    write_checkpoint(good, family, original_names=not fused)
            folder = Path(shutil.copytree(good, Path(made) / "bad"))
            said = draw.choice(MUTATIONS)(folder, draw)
            found, detail = outcome(folder)
            shutil.rmtree(folder)
            seen[found] += 1
            line = f"{number} {family}{' fused' if fused else ''}: {said}: {found}: {detail[:300]}"
            report(line)
            if found.isupper():
                wrong.append(line)
    report(f"seed {seed}: {dict(seen)}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    sys.exit("\n".join(run(arguments.count, arguments.seed, print)) or None)

"""The text the built-in model learns from: what every Python installation carries.

Two kinds of documents: the `.py` files of the standard library and the language topics that
`help()` prints. The list is sorted and the split is a hash of a document's name, so two machines
with the same Python see the same corpus. Nothing is downloaded.
"""

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 4
SKIPPED = ("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
LONGEST = 400_000  # bytes; larger files are tables, not code


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    is_test: bool
    held_out: bool


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in SKIPPED or part.startswith("config-") for part in name.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few tests are broken on purpose
            continue
        if not 0 < len(text) <= LONGEST:
            continue
        is_test = any(part in ("test", "tests", "idle_test") for part in name.parts)
        key = name.as_posix()
        yield Document(key, text, is_test, _is_held_out(key))


def _topics() -> Iterator[Document]:
    """Language topics quote one another, so all of them stay on the training side."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic:{name}", topics[name], is_test=False, held_out=False)


def documents() -> list[Document]:
    return [*_sources(), *_topics()]


def pieces(text: str, rng: random.Random, every: int = 250) -> Iterator[str]:
    """Cut a text at random places, half of them behind white space.

    Encoding the pieces one by one shows the model the token boundaries that a prompt's end
    makes (`def ` with its space), which the tokenizer would otherwise never produce.
    """
    start = 0
    while start < len(text):
        stop = start + rng.randint(1, 2 * every)
        if rng.random() < 0.5 and (gap := re.compile(r"\s+").search(text, stop)):
            stop = gap.start() + rng.randint(1, len(gap.group()))
        yield text[start:stop]
        start = stop

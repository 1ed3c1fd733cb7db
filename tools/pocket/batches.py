"""Turns the corpus into training batches and held-out token streams.

One pass holds every library document twice and every test once, in random order, with the texts
cut anew each time (see `corpus.pieces`). A batch is `rows` windows of `width` tokens and their
successors.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.pocket.corpus import Document, pieces


def stream(docs: list[Document], tokenizer: Tokenizer, rng: random.Random) -> np.ndarray:
    docs = [d for d in docs for _ in range(1 if d.is_test else 2)]
    rng.shuffle(docs)
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids: list[np.ndarray] = []
    for start in range(0, len(docs), 256):  # a pass at once would take gigabytes
        texts: list[str] = []
        ends: set[int] = set()
        for doc in docs[start : start + 256]:
            texts.extend(pieces(doc.text, rng))
            ends.add(len(texts) - 1)
        for i, code in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            ids.append(np.array(code.ids + [eos] * (i in ends), dtype=np.uint16))
    return np.concatenate(ids)


def batches(
    docs: list[Document], tokenizer: Tokenizer, *, rows: int, width: int, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (pass number, ids[rows,width], next ids[rows,width]) without end."""
    rng = random.Random(seed)
    turn = 0
    while True:
        flat = torch.from_numpy(stream(docs, tokenizer, rng).astype(np.int64))
        count = (len(flat) - 1) // width
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count - rows + 1, rows):
            picked = [i * width for i in order[start : start + rows]]
            x = torch.stack([flat[a : a + width] for a in picked])
            y = torch.stack([flat[a + 1 : a + width + 1] for a in picked])
            yield turn, x, y
        turn += 1


def windows(docs: list[Document], tokenizer: Tokenizer, width: int) -> tuple[Tensor, Tensor]:
    """Plainly encoded documents as [n,width] windows and successors; the rest is dropped."""
    eos = tokenizer.token_to_id("<|endoftext|>")
    flat: list[int] = []
    for doc in docs:
        flat += [*tokenizer.encode(doc.text, add_special_tokens=False).ids, eos]
    count = (len(flat) - 1) // width
    ids = torch.tensor(flat)
    return ids[: count * width].view(-1, width), ids[1 : count * width + 1].view(-1, width)

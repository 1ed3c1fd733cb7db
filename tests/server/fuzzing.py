"""Requests with something wrong in them, drawn at random; for the tests and the load benchmark."""

from __future__ import annotations

import json
import random
from typing import Any

ODD_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    2**63,
    "",
    "a",
    "\x00",
    "é" * 50,
    [],
    ["a"],
    [1, 2],
    [[1]],
    {},
    {"a": 1},
    {"type": "text"},
]
NAMES = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "n",
    "echo",
    "tools",
    "user",
    "best_of",
    "logit_bias",
    "frobnicate",
]


def fuzzed_request(draw: random.Random, model: str) -> bytes:
    """The bytes of a request: a small valid one, changed in its body, in its head, or anywhere."""
    chat = draw.random() < 0.5
    body: dict[str, Any] = {"model": model, "max_tokens": 1}
    if chat:
        body["messages"] = [{"role": "user", "content": "a"}]
    else:
        body["prompt"] = "a"
    for _ in range(draw.randrange(3)):
        body[draw.choice(NAMES)] = draw.choice(ODD_VALUES)
    if body.get("max_tokens") not in (0, -1, 1):  # so that what is valid after all ends soon
        body["max_tokens"] = draw.choice([1, "1", 1.5])
    if body.get("max_completion_tokens") == 3:
        del body["max_completion_tokens"]
    text = json.dumps(body).encode()
    if draw.random() < 0.3:
        text = _mutated(draw, text)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if draw.random() < 0.1:
        path = draw.choice(["/", "/v1", "/metrics", "/v1/models/x", "//", "/%00", "/" + "a" * 9000])
    method = draw.choice(["POST"] * 8 + ["GET", "PUT", "HEAD", "OPTIONS", "x"])
    length = len(text) if draw.random() < 0.9 else draw.choice([0, 1, 10**7, "-1", "x", ""])
    kind = "application/json" if draw.random() < 0.9 else draw.choice(["", "text/plain", "\x01"])
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    ).encode("latin-1")
    data = head + text
    return _mutated(draw, data) if draw.random() < 0.3 else data


def _mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out or doubled."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        if not changed:
            break
        place = draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 8)]
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 8)]
    return bytes(changed)

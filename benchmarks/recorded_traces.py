"""Traces of the built-in model, recorded again for a benchmark of policies.

Prompts are the beginnings of modules of the standard library. Tokens are sampled from one seed, so
the same machine and Python version record the same trace again.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moeinf
from moeinf.pocket import POCKET
from moeinf.traces.trace import Trace

MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "enum", "fractions", "functools", "gettext", "glob", "gzip", "heapq",
    "inspect", "ipaddress", "locale", "mailbox", "numbers", "optparse", "pickletools", "pickle",
    "platform", "pprint", "queue", "random", "sched", "shlex", "shutil", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap",
)  # fmt: skip


def record_traces() -> list[Trace]:
    """One short request, one long one, many short ones, and a batch of eight."""
    model: Any = moeinf.load(POCKET, device="cpu")
    prompts = _prompts(40)
    cases: dict[str, list[tuple[torch.Tensor, int]]] = {
        "one request": [(prompts[:1, :16], 112)],
        "one long request": [(prompts[1:2], 460)],
        "40 requests": [(one[None, :24], 64) for one in prompts],
        "batch of 8": [(prompts[8:16, :32], 160)],
    }
    traces = []
    for name, requests in cases.items():
        torch.manual_seed(0)
        with model.moeinf.cache.record() as recorder:
            for prompt, tokens in requests:
                model.generate(
                    prompt,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=True,
                    temperature=0.8,
                    attention_mask=torch.ones_like(prompt),
                    pad_token_id=0,
                )
        trace = recorder.trace(model="built-in", source="benchmarks.recorded_traces")
        traces.append(replace(trace, name=f"built-in, {name}"))
    return traces


def _prompts(length: int) -> torch.Tensor:
    """int64 [modules, length]: the beginning of each module."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    rows = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")[:600]
        rows.append(tokenizer(text, return_tensors="pt")["input_ids"][0, :length])
    return torch.stack(rows)

"""Traces from tables of routes, one row each, as scripts and spreadsheets write them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moeinf.errors import TraceError
from moeinf.traces.trace import DECODE, PREFILL, Trace

_PHASES = {"0": PREFILL, "prefill": PREFILL, "1": DECODE, "decode": DECODE}
_COLUMNS = ("sequence", "phase", "token", "layer", "expert", "weight")


def read_csv(path: str | Path, *, num_experts: int, model: str = "") -> Trace:
    """From a table with the columns sequence, phase, token, layer, expert and maybe weight.

    One row per route, in routing order; a token's rows stand together. `token` counts within its
    sequence, `phase` is prefill or decode (or 0 or 1). Layers are numbered from 0.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [c for c in _COLUMNS[:-1] if c not in columns]:
                raise TraceError(
                    f"{path}: expected the columns {', '.join(_COLUMNS)}, found no {missing[0]!r}"
                )
            return _from_rows(path, reader, "weight" in columns, num_experts, model)
    except (csv.Error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected comma-separated text: {error}") from None


def _from_rows(
    path: Path, rows: Iterable[dict[str, str]], weighted: bool, num_experts: int, model: str
) -> Trace:
    tokens: list[tuple[int, int]] = []  # (sequence, phase)
    seen: set[tuple[int, int]] = set()
    at: list[tuple[int, int]] = []  # per route: (token, layer)
    routes: list[tuple[int, float]] = []
    current = None
    for line, row in enumerate(rows, start=2):
        try:
            sequence, token, layer = (int(row[c]) for c in ("sequence", "token", "layer"))
            expert = int(row["expert"])
            weight = float(row["weight"]) if weighted else 0.0
            phase = _PHASES[row["phase"].strip().lower()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TraceError(
                f"{path}, line {line}: expected whole numbers, a phase of prefill or decode and a "
                f"weight, found {dict(row)}"
            ) from None
        if (sequence, token) != current:
            current = (sequence, token)
            if current in seen:
                raise TraceError(
                    f"{path}, line {line}: expected the rows of a token together, found token "
                    f"{token} of sequence {sequence} again"
                )
            seen.add(current)
            tokens.append((sequence, phase))
        if tokens[-1][1] != phase or layer < 0 or not 0 <= expert < num_experts:
            raise TraceError(
                f"{path}, line {line}: expected one phase per token, a layer from 0 and an expert "
                f"below {num_experts}, found {dict(row)}"
            )
        at.append((len(tokens) - 1, layer))
        routes.append((expert, weight))
    if not tokens:
        raise TraceError(f"{path}: expected at least 1 token, found none")
    layers = max(layer for _, layer in at) + 1
    if layers > 10_000:
        raise TraceError(f"{path}: expected at most 10000 layers, found layer {layers - 1}")
    places = np.array(at, np.int64) @ np.array([layers, 1])
    order = np.argsort(places, kind="stable")
    sizes = np.bincount(places, minlength=len(tokens) * layers)
    rank = np.empty(len(at), np.int64)
    rank[order] = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (len(tokens) * layers, int(sizes.max()))
    experts = np.full(shape, -1, np.int16)
    weights = np.zeros(shape, np.float32)
    experts[places, rank] = [expert for expert, _ in routes]
    weights[places, rank] = [weight for _, weight in routes]
    final = (len(tokens), layers, shape[1])
    return Trace.from_arrays(
        experts.reshape(final),
        num_experts=num_experts,
        sequence=[sequence for sequence, _ in tokens],
        phase=[phase for _, phase in tokens],
        weights=weights.reshape(final) if weighted else None,
        model=model,
        name=path.name,
    )

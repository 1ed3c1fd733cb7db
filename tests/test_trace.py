"""Traces: saving and loading keeps every value, and loading refuses every malformed file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_traces import random_trace
from safetensors.numpy import save_file

from moeinf.errors import TraceError
from moeinf.traces.csv_import import read_csv
from moeinf.traces.trace import FORMAT, Trace


def same(a: Trace, b: Trace) -> bool:
    fields = ("experts", "sequence", "phase", "weights", "router")
    return a.num_experts == b.num_experts and all(
        (getattr(a, f) is None and getattr(b, f) is None)
        or np.array_equal(getattr(a, f), getattr(b, f))
        for f in fields
    )


def rich_trace(seed: int) -> Trace:
    """With every optional tensor."""
    rng = np.random.default_rng(seed)
    trace = random_trace(seed)
    return replace(
        trace,
        weights=rng.random(trace.experts.shape).astype(np.float16),
        router=rng.random((*trace.experts.shape[:2], trace.num_experts)).astype(np.float16),
        model="a model",
        source="a source",
        license="a license",
    )


@pytest.mark.parametrize("make", [random_trace, rich_trace])
def test_a_saved_trace_loads_the_same(make: Any, tmp_path: Path, seed: int) -> None:
    trace = make(seed)
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(tmp_path / "t.safetensors")
    assert same(trace, loaded)
    assert (loaded.model, loaded.source, loaded.license) == (
        trace.model,
        trace.source,
        trace.license,
    )
    assert loaded.name == "t.safetensors"


def test_split_and_concat_are_inverse(seed: int) -> None:
    trace = rich_trace(seed)
    parts = trace.split()
    assert len(parts) == len(set(trace.sequence.tolist()))
    joined = Trace.concat(parts)
    assert joined.sequence.tolist() == [s // 2 for s in trace.sequence.tolist()]
    assert same(replace(trace, sequence=joined.sequence), joined)


def test_concat_drops_what_not_all_have_and_refuses_other_shapes(seed: int) -> None:
    assert Trace.concat([rich_trace(seed), random_trace(seed + 1)]).weights is None
    with pytest.raises(TraceError, match="layers, experts and k"):
        Trace.concat([random_trace(1), random_trace(2, layers=6)])
    with pytest.raises(TraceError, match="at least one"):
        Trace.concat([])


def test_info_counts(seed: int) -> None:
    trace = random_trace(seed)
    info = trace.info()
    assert info["prefill_tokens"] + info["decode_tokens"] == trace.num_tokens == info["tokens"]
    assert (info["num_layers"], info["num_experts"], info["top_k"]) == (5, 11, 3)
    used = {
        (layer, expert)
        for token in trace.experts.tolist()
        for layer, experts in enumerate(token)
        for expert in experts
        if expert >= 0
    }
    assert info["experts_used"] == len(used)
    assert info["weights"] is False


def write(path: Path, trace: Trace, metadata: dict[str, str] | None = None, **tensors: Any) -> Path:
    """The trace's file with tensors (None: left out) and metadata replaced."""
    content = {"experts": trace.experts, "sequence": trace.sequence, "phase": trace.phase}
    content |= tensors
    facts = {
        "format": FORMAT,
        "num_layers": str(trace.num_layers),
        "num_experts": str(trace.num_experts),
        "top_k": str(trace.top_k),
    }
    save_file(
        {name: array for name, array in content.items() if array is not None},
        path,
        metadata=facts | (metadata or {}),
    )
    return path


def changed(array: Any, index: Any, value: float) -> Any:
    array = array.copy()
    array[index] = value
    return array


BASE = random_trace(3)
ROUTER = np.full((*BASE.experts.shape[:2], 11), 0.25, np.float16)
BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "an id above": (
        {"experts": changed(BASE.experts, (2, 1, 0), 11)},
        "ids from -1 to 10, found 11 at token 2, layer 1",
    ),
    "an id below": ({"experts": changed(BASE.experts, (0, 4, 2), -2)}, "found -2 at token 0"),
    "a phase": ({"phase": changed(BASE.phase, 5, 2)}, "'phase'.*found 2 at token 5"),
    "sequences out of order": (
        {"sequence": changed(BASE.sequence, 0, 9)},
        "never decrease, found .* at token 1",
    ),
    "a negative sequence": ({"sequence": changed(BASE.sequence, 0, -1)}, "found -1 at token 0"),
    "a dtype": ({"experts": BASE.experts.astype(np.int32)}, "'experts': expected int16"),
    "a shape": ({"sequence": BASE.sequence[:-1]}, "'sequence': expected shape"),
    "dimensions": ({"experts": BASE.experts[0]}, "3 dimensions"),
    "no tokens": (
        {"experts": BASE.experts[:0], "sequence": BASE.sequence[:0], "phase": BASE.phase[:0]},
        "at least 1 token",
    ),
    "no k": ({"experts": BASE.experts[:, :, :0]}, "at least 1 token, layer, expert"),
    "a missing tensor": ({"phase": None}, "'phase': expected, but not found"),
    "an unknown tensor": ({"extra": BASE.phase}, "found also .*extra"),
    "weights of another shape": (
        {"weights": np.ones((1, 5, 3), np.float32)},
        "'weights': expected shape",
    ),
    "weights that are not numbers": (
        {"weights": np.full(BASE.experts.shape, np.nan, np.float32)},
        "'weights': expected finite",
    ),
    "weights that are infinite": (
        {"weights": np.full(BASE.experts.shape, np.inf, np.float16)},
        "'weights': expected finite",
    ),
    "a router with NaN": (
        {"router": changed(ROUTER, (1, 2, 3), np.nan)},
        "'router': expected finite values, found NaN",
    ),
    "a router with infinity": (
        {"router": changed(ROUTER, (1, 2, 3), np.inf)},
        "'router': expected finite values",
    ),
    "a router below 0": (
        {"router": changed(ROUTER, (1, 2, 3), -0.5)},
        "'router': expected probabilities from 0 to 1, found -0.5 to 0.25",
    ),
    "a router above 1": (
        {"router": changed(ROUTER, (1, 2, 3), 1.5)},
        "'router': expected probabilities from 0 to 1, found 0.25 to 1.5",
    ),
    "a router of another dtype": (
        {"router": ROUTER.astype(np.float32)},
        "'router': expected float16, found float32",
    ),
    "a router of another width": (
        {"router": np.ones((*BASE.experts.shape[:2], 10), np.float16)},
        "'router': expected shape",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_file_with_bad_tensors_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = BAD_TENSORS[case]
    path = write(tmp_path / "bad.safetensors", BASE, **tensors)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "moeinf-trace-9"}, "'format': expected"),
        ({"num_experts": "eleven"}, "'num_experts': expected a whole number"),
        ({"num_experts": "0"}, "num_experts: expected 1 to"),
        ({"num_experts": "40000"}, "num_experts: expected 1 to"),
        ({"num_layers": "6"}, "'num_layers': expected 5"),
        ({"top_k": ""}, "'top_k': expected a whole number"),
    ],
)
def test_a_file_with_bad_metadata_is_refused(
    metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.load(write(tmp_path / "bad.safetensors", BASE, metadata))


def test_truncated_and_foreign_files_are_refused(tmp_path: Path, seed: int) -> None:
    whole = write(tmp_path / "whole.safetensors", BASE).read_bytes()
    rng = np.random.default_rng(seed)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *rng.integers(1, len(whole), 20).tolist()]:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"cut\.safetensors"):
            Trace.load(cut)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"\x7fELF" + bytes(1000))
    with pytest.raises(TraceError, match="not a readable safetensors file"):
        Trace.load(foreign)
    save_file({"weight": np.ones(3, np.float32)}, foreign)
    with pytest.raises(TraceError, match="'format'"):
        Trace.load(foreign)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "absent.safetensors")


def test_arrays_of_any_integer_type_come_in(seed: int) -> None:
    trace = random_trace(seed)
    found = Trace.from_arrays(
        trace.experts.astype(np.int64).tolist(),
        num_experts=11,
        sequence=trace.sequence.astype(np.uint64),
        phase=trace.phase.astype(np.int64),
    )
    assert same(found, trace)
    bare = Trace.from_arrays(trace.experts[::2], num_experts=11)
    assert bare.info()["sequences"] == 1 and bare.info()["prefill_tokens"] == 0


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros((2, 2, 2), np.float32), "expected integers"),
        (np.full((2, 2, 2), 70_000), "fit int16"),
        (np.full((2, 2, 2), 11), "ids from -1 to 10"),
        (np.zeros((2, 2), np.int16), "3 dimensions"),
        (np.zeros((0, 2, 2), np.int16), "at least 1 token"),
        (np.full((1, 1, 1), 2**63, np.uint64), "fit int16"),
        ([[[1], [2, 3]]], "'experts': expected an array"),
    ],
)
def test_arrays_that_are_no_routing_are_refused(experts: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.from_arrays(experts, num_experts=11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": [1, 0]}, "never decrease, found 0 at token 1"),
        ({"sequence": [0.0, 1.0]}, "'sequence': expected integers"),
        ({"sequence": [0]}, "'sequence': expected shape"),
        ({"phase": [0, 2]}, "'phase': expected 0 .*found 2 at token 1"),
        ({"phase": [0, 300]}, "'phase': expected values that fit uint8"),
        ({"weights": np.zeros((2, 2))}, "'weights': expected shape"),
        ({"weights": "heavy"}, "'weights': expected an array"),
        ({"weights": np.full((2, 2, 2), 1e300)}, "'weights': expected finite"),
        ({"router": np.full((2, 2, 11), 1e9)}, "'router': expected finite"),
        ({"router": np.full((2, 2, 11), -0.1)}, "'router': expected probabilities"),
        ({"num_experts": 2.5}, "num_experts: expected 1 to 32767, found 2.5"),
        ({"num_experts": "11"}, "num_experts: expected 1 to 32767, found '11'"),
        ({"num_experts": 0}, "num_experts: expected 1 to 32767, found 0"),
    ],
)
def test_arrays_that_do_not_fit_the_routing_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.from_arrays(np.zeros((2, 2, 2), np.int16), **({"num_experts": 11} | changes))


HEADER = "sequence,phase,token,layer,expert,weight\n"


def test_a_table_comes_in_with_gaps_as_none(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        HEADER
        + "0,prefill,0,0,3,0.75\n0,prefill,0,0,1,0.25\n0,prefill,0,1,2,1\n"
        + "0,decode,1,1,4,0.5\n"
        + "3,1,0,0,4,0.5\n3,1,0,1,0,0.125\n"
    )
    trace = read_csv(table, num_experts=5)
    assert trace.experts.tolist() == [[[3, 1], [2, -1]], [[-1, -1], [4, -1]], [[4, -1], [0, -1]]]
    assert trace.sequence.tolist() == [0, 0, 3]
    assert trace.phase.tolist() == [0, 1, 1]
    assert trace.weights is not None
    assert trace.weights.tolist() == [
        [[0.75, 0.25], [1, 0]],
        [[0, 0], [0.5, 0]],
        [[0.5, 0], [0.125, 0]],
    ]


def test_a_table_written_from_a_trace_reads_back_the_same(tmp_path: Path, seed: int) -> None:
    trace = random_trace(seed)
    lines = []
    for token, (experts, sequence, phase) in enumerate(
        zip(trace.experts.tolist(), trace.sequence, trace.phase, strict=True)
    ):
        for layer, routes in enumerate(experts):
            lines += [f"{sequence},{phase},{token},{layer},{e},1\n" for e in routes if e >= 0]
    table = tmp_path / "t.csv"
    table.write_text(HEADER + "".join(lines))
    found = read_csv(table, num_experts=11)
    kept = [[[e for e in r if e >= 0] for r in token] for token in trace.experts.tolist()]
    assert [[[e for e in r if e >= 0] for r in token] for token in found.experts.tolist()] == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token,layer,expert\n0,0,1\n", "expected the columns"),
        (HEADER, "at least 1 token"),
        (HEADER + "0,decode,0,0,1,x\n", "line 2"),
        (HEADER + "0,sleep,0,0,1,1\n", "line 2"),
        (HEADER + "0,decode,0\n", "line 2"),
        (HEADER + "0,decode,0,0,5,1\n", "expert below 5"),
        (HEADER + "0,decode,0,-1,1,1\n", "layer from 0"),
        (HEADER + "0,decode,0,99999999,1,1\n", "at most 10000 layers"),
        (HEADER + "0,decode,0,0,1,1\n0,prefill,0,0,2,1\n", "one phase per token"),
        (HEADER + "0,decode,0,0,1,1\n0,decode,1,0,1,1\n0,decode,0,0,2,1\n", "rows of a token"),
        (HEADER + "4,decode,0,0,1,1\n3,decode,0,0,1,1\n", "never decrease"),
        (HEADER + "-1,decode,0,0,1,1\n", "start at 0"),
        (HEADER + "9999999999,decode,0,0,1,1\n", "'sequence': expected values that fit int32"),
        (HEADER + f"0,decode,0,0,{'9' * 30},1\n", "expert below 5"),
        (HEADER + f"0,decode,0,0,{'9' * 200_000},1\n", r"t\.csv: expected comma-separated"),
        (HEADER + "0,decode,0,0,1,nan\n", "'weights': expected finite"),
        (HEADER + "0,decode,0,0,1,\x001\n", r"t\.csv"),
        ("", "expected the columns"),
    ],
)
def test_a_bad_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_csv(table, num_experts=5)


def test_a_file_that_is_no_text_is_no_table(tmp_path: Path, seed: int) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"\xff\xfe" + np.random.default_rng(seed).bytes(3000))
    with pytest.raises(TraceError, match=r"t\.csv: expected comma-separated text"):
        read_csv(table, num_experts=5)


def test_a_table_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("\ufeff" + HEADER + "0,decode,0,0,1,1\n", encoding="utf-8")
    assert read_csv(table, num_experts=5).experts.tolist() == [[[1]]]

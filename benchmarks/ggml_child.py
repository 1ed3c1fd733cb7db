"""Times llama.cpp's kernels on one layer of experts. Runs in the environment of llama-cpp-python.

    python benchmarks/ggml_child.py

The first line on stdin is a job in JSON: `type` (of ggml), `tokens`, `hidden`, `intermediate`,
`experts`, `top_k`, `threads` and `repacked`: whether the weights are arranged anew for this
processor, as llama.cpp does for a model that memory holds. The weights are random, quantised by
llama.cpp's own code.

After the answer "ready" each further line is a request to compute; its answer is the seconds of one
layer. The process ends where llama.cpp cannot arrange that type anew. At one token a graph has as
many layers as it takes to visit every expert once, as ours does, so that starting the threads
counts little. The products are those of llama.cpp's own models: gate, up, SwiGLU, down; the
weighted sum over a token's experts is left out, in llama.cpp's favour.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32, I32 = 0, 26
TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
         "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
         "MXFP4": 39}  # fmt: skip


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def library(name: str, functions: dict[str, tuple[Any, ...]]) -> ctypes.CDLL:
    """`functions`: the result's type, then the arguments'."""
    found = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / f"lib{name}.so"))
    for function, (result, *arguments) in functions.items():
        getattr(found, function).restype = result
        getattr(found, function).argtypes = arguments
    return found


BASE = library(
    "ggml-base",
    {
        "ggml_init": (c_void_p, InitParams),
        "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
        "ggml_new_tensor_3d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
        "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        "ggml_swiglu_split": (c_void_p, c_void_p, c_void_p, c_void_p),
        "ggml_row_size": (c_size_t, c_int, c_int64),
        "ggml_quantize_chunk": (
            c_size_t, c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p,
        ),
        "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
        "ggml_build_forward_expand": (None, c_void_p, c_void_p),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
        "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
        "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
        "ggml_gallocr_new": (c_void_p, c_void_p),
        "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    },
)  # fmt: skip
BASE.ggml_backend_cpu_buffer_type.restype = c_void_p
REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"
CPU = library(
    "ggml-cpu",
    {
        "ggml_backend_cpu_init": (c_void_p,),
        "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    },
)


def context(tensors: int) -> int:
    """Of tensors without their data."""
    found: int = BASE.ggml_init(InitParams((tensors + 64) * 1024, None, True))
    return found


def main() -> None:
    job = json.loads(sys.stdin.readline())
    compute, layers = prepare(job)
    compute()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        compute()
        print((time.perf_counter() - start) / layers, flush=True)


def prepare(job: dict[str, Any]) -> tuple[Any, int]:
    tokens, experts, top_k = job["tokens"], job["experts"], job["top_k"]
    hidden, intermediate = job["hidden"], job["intermediate"]
    kind = TYPES[job["type"]]
    layers = experts // top_k if tokens == 1 else 1

    weights = context(3)
    shapes = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    matrices = [BASE.ggml_new_tensor_3d(weights, kind, *one, experts) for one in shapes]
    buffer = BASE.ggml_backend_cpu_buffer_type()
    if job["repacked"]:
        repacked = getattr(CPU, REPACKED)
        repacked.restype = c_void_p
        buffer = repacked()
    if not BASE.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer):
        sys.exit("no memory for the weights")
    random = np.random.default_rng(0)
    for tensor, (columns, rows) in zip(matrices, shapes, strict=True):
        one = packed(kind, random.standard_normal((rows, columns), np.float32) / columns**0.5)
        every = np.tile(one, experts)  # a repacked tensor is set as a whole
        BASE.ggml_backend_tensor_set(tensor, every.ctypes.data, 0, every.nbytes)

    inputs = context(2 * layers)
    x = BASE.ggml_new_tensor_3d(inputs, F32, hidden, 1, tokens)
    ids = [BASE.ggml_new_tensor_2d(inputs, I32, top_k, tokens) for _ in range(layers)]
    if not BASE.ggml_backend_alloc_ctx_tensors_from_buft(
        inputs, BASE.ggml_backend_cpu_buffer_type()
    ):
        sys.exit("no memory for the inputs")
    set_values(x, random.standard_normal((tokens, hidden), np.float32))
    for layer, tensor in enumerate(ids):
        if tokens == 1:
            chosen = (np.arange(top_k) + layer * top_k)[None]
        else:
            chosen = np.stack([random.permutation(experts)[:top_k] for _ in range(tokens)])
        set_values(tensor, chosen.astype(np.int32))

    nodes = context(16 * layers + 4096)
    graph = BASE.ggml_new_graph_custom(nodes, 16 * layers + 64, False)
    gate, up, down = matrices
    for chosen in ids:
        halves = [BASE.ggml_mul_mat_id(nodes, one, x, chosen) for one in (gate, up)]
        middle = BASE.ggml_swiglu_split(nodes, *halves)
        BASE.ggml_build_forward_expand(graph, BASE.ggml_mul_mat_id(nodes, down, middle, chosen))
    backend = CPU.ggml_backend_cpu_init()
    CPU.ggml_backend_cpu_set_n_threads(backend, job["threads"])
    allocator = BASE.ggml_gallocr_new(BASE.ggml_backend_cpu_buffer_type())
    if not BASE.ggml_gallocr_alloc_graph(allocator, graph):
        sys.exit("no memory for the graph")

    def compute() -> None:
        if BASE.ggml_backend_graph_compute(backend, graph):
            sys.exit("ggml could not compute the graph")

    return compute, layers


def packed(kind: int, values: np.ndarray) -> np.ndarray:
    """Rows of float32 in one of ggml's types, as bytes."""
    rows, columns = values.shape
    out = np.empty(rows * BASE.ggml_row_size(kind, columns), np.uint8)
    source = values.ctypes.data_as(POINTER(c_float))
    BASE.ggml_quantize_chunk(kind, source, out.ctypes.data, 0, rows, columns, None)
    return out


def set_values(tensor: int, values: np.ndarray) -> None:
    values = np.ascontiguousarray(values)
    BASE.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


if __name__ == "__main__":
    main()

"""Times llama.cpp on given token ids. Runs in the environment of llama-cpp-python alone.

    python benchmarks/llama_child.py JOB.json

A job says `model`, `threads`, `first` and `second` (prompts), `warm` and `tokens` (one at a time),
`repacked` (weights arranged anew, which then cannot leave memory); or `quantise` (from `model` to
that path) and `ftype`. The answer is one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if "quantise" in job:
        options = llama.llama_model_quantize_default_params()
        options.ftype, options.nthread = job["ftype"], job["threads"]
        failed = llama.llama_model_quantize(
            job["model"].encode(), job["quantise"].encode(), ctypes.byref(options)
        )
        sys.exit(failed)
    print(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    options = llama.llama_model_default_params()
    options.load_mode = llama.LLAMA_LOAD_MODE_MMAP
    options.use_extra_bufts = job["repacked"]
    model = llama.llama_model_load_from_file(job["model"].encode(), options)
    if not model:
        sys.exit(f"llama.cpp cannot load {job['model']}")
    settings = llama.llama_context_default_params()
    longest = max(len(job["first"]), len(job["second"]))
    settings.n_ctx = longest + len(job["warm"]) + len(job["tokens"]) + 8
    settings.n_batch = settings.n_ubatch = max(longest, 32)
    settings.n_threads = settings.n_threads_batch = job["threads"]
    context = llama.llama_init_from_model(model, settings)
    loaded = time.perf_counter()

    def run(ids: list[int]) -> float:
        began = time.perf_counter()
        tokens = (llama.llama_token * len(ids))(*ids)
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))):
            sys.exit("llama_decode failed")
        llama.llama_get_logits_ith(context, -1)[0]
        return time.perf_counter() - began

    first = run(job["first"])
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    prefill = run(job["second"])
    for token in job["warm"]:
        run([token])
    times = [run([token]) for token in job["tokens"]]
    logits = llama.llama_get_logits_ith(context, -1)
    return {
        "repacked": job["repacked"],
        "load_seconds": loaded - start,
        "first_token_seconds": first,
        "prefill_seconds": prefill,
        "decode_seconds": times,
        "likeliest": max(range(job["vocabulary"]), key=lambda i: logits[i]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()

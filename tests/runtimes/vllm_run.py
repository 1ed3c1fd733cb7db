"""One run of vLLM's offline engine; prints JSON. For test_vllm.py and benchmarks/runtimes.py."""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

PROMPTS = ["Once upon a time", "The little dog", "One day, a girl named Lily"]


def main() -> None:
    from vllm import LLM, SamplingParams

    from moeinf.cache import live
    from moeinf.cache.cache import _named
    from moeinf.pocket import POCKET

    options = json.loads(sys.argv[1])
    ids = options.pop("prompt_ids", None)  # of a model without a tokenizer
    prompts = PROMPTS if ids is None else [{"prompt_token_ids": one} for one in ids]
    if ids is not None:
        options["skip_tokenizer_init"] = True
    ranks = options.get("tensor_parallel_size", 1)
    model = LLM(
        distributed_executor_backend="uni" if ranks == 1 else "mp",
        max_model_len=256,
        seed=0,
        **({"enforce_eager": True, "model": str(POCKET)} | options),
    )
    at_start = [one["accesses"] for one in reports(live)]
    recorders = [cache.record() for cache in _named.values()]  # of this process alone
    answers = model.generate(
        prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    )
    traces = [recorder.trace() for recorder in recorders]
    found = {
        "tokens": [list(one.outputs[0].token_ids) for one in answers],
        "prompt_tokens": sum(len(one.prompt_token_ids or ()) for one in answers),
        "at_start": at_start,
        "stats": reports(live),
        "phases": [[int((one.phase == phase).sum()) for phase in (0, 1)] for one in traces],
        "metrics": metrics(),
    }
    if ranks == 1:
        (found["parameters"],) = model.apply_model(
            lambda module: sum(one.nbytes for one in module.parameters())
        )
    print("RESULT", json.dumps(found))


def reports(live) -> list:  # type: ignore
    """The caches of this process and of its workers."""
    answers = [live.ask(pid) for pid in live.running(below=os.getpid())]
    return [cache for answer in answers for cache in answer["caches"]]


def metrics() -> dict[str, float]:
    """The sums of what a server would show at /metrics."""
    from prometheus_client import REGISTRY

    sums: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("moeinf_"):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


if __name__ == "__main__":
    main()

"""One run of vLLM's offline engine with the built-in model; prints JSON. For test_vllm.py."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

PROMPTS = ["Once upon a time", "The little dog", "One day, a girl named Lily"]


def main() -> None:
    from vllm import LLM, SamplingParams

    import moeinf

    options = json.loads(sys.argv[1])
    ranks = options.get("tensor_parallel_size", 1)
    model = LLM(
        model=str(Path(moeinf.__file__).parent / "pocket"),
        distributed_executor_backend="uni" if ranks == 1 else "mp",
        max_model_len=256,
        seed=0,
        **({"enforce_eager": True} | options),
    )
    sampling = SamplingParams(temperature=0, max_tokens=24)
    found = {"tokens": [list(o.outputs[0].token_ids) for o in model.generate(PROMPTS, sampling)]}
    if ranks == 1:
        from moeinf.integrations.vllm import experts

        (bytes_of_parameters,) = model.apply_model(
            lambda module: sum(one.nbytes for one in module.parameters())
        )
        caches = [cache.stats() for cache in experts._caches.values()]
        found |= {"parameters": bytes_of_parameters, "stats": caches}
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()

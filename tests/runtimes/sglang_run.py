"""One run of SGLang's offline engine on the CPU; prints JSON. For test_sglang.py.

SGLang's CPU kernels, `sgl_kernel`, are on no registry. References in torch stand in for the one
that the model needs. torchvision is only imported; its compiled part is for another torch.
"""

import json
import os
import sys
import types

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
PROMPTS = ["Once upon a time", "The little dog", "One day, a girl named Lily"]

# SGLang's other processes run this file's top too, before anything of SGLang.
kernels = torch.library.Library("sgl_kernel", "DEF")
kernels.define(
    "topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize,"
    " Tensor? correction_bias) -> (Tensor, Tensor)"
)


def topk_softmax_cpu(hidden_states, gating_output, topk, renormalize, correction_bias):  # type: ignore
    assert correction_bias is None
    weights, ids = torch.softmax(gating_output.float(), -1).topk(topk)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids.int()


def absent(name: str):  # type: ignore
    """What is imported and not called: names of kernels; nothing else is there."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def fail(*_: object) -> None:
        raise RuntimeError(f"{name} has no reference here")

    return fail


kernels.impl("topk_softmax_cpu", topk_softmax_cpu, "CPU")
sys.modules["sgl_kernel"] = types.ModuleType("sgl_kernel")
sys.modules["sgl_kernel"].__getattr__ = absent  # type: ignore
vision = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    vision.define(f"{operator}(Tensor boxes, Tensor scores, float iou) -> Tensor")


def main() -> None:
    import sglang

    from moeinf.cache import live

    options = json.loads(sys.argv[1])
    ids = options.pop("prompt_ids", None)  # of a model without a tokenizer
    asked = {"prompt": PROMPTS} if ids is None else {"input_ids": ids}
    if ids is not None:
        options["skip_tokenizer_init"] = True
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    if options.get("tp_size", 1) > 1:  # a core for each rank
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores[: options["tp_size"]])
    engine = sglang.Engine(
        **{
            "device": "cpu",
            "attention_backend": "torch_native",
            "dtype": "bfloat16",
            "max_total_tokens": 2048,
            "mem_fraction_static": 0.3,
            "disable_radix_cache": True,
            "skip_server_warmup": True,
            "random_seed": 0,
            "log_level": "warning",
        }
        | options
    )
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    answers = engine.generate(**asked, sampling_params=sampling)
    found = {"tokens": [one["output_ids"] for one in answers]}
    reports = [live.ask(pid) for pid in live.running(below=os.getpid())]
    found["caches"] = [cache for one in reports for cache in one["caches"]]
    print("RESULT", json.dumps(found), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()

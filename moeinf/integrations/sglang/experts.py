"""Replaces SGLang's experts of a layer: no weights, and a forward out of the cache.

FusedMoE.__init__     gets a method of ours, before it creates weights
the weights' iterator gives the loader no tensor of an expert: no page of them is read
ModelRunner           says its passes, and fails where no layer became ours
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_server_args

from moeinf.cache.cache import ExpertCache
from moeinf.cache.passes import ForwardPass
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.experts.op import fused_experts
from moeinf.integrations.layers import check_layer
from moeinf.integrations.options import checked

_options: dict[str, Any] = {}
_caches: dict[str, ExpertCache] = {}


def install(text: str) -> None:
    """Once or more often. `text` is JSON: {"memory": "25%"}."""
    if _options:
        return
    _options.update(checked(json.loads(text), "MOEINF_SGLANG"))
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    for target, hook, kind in (
        (f"{FusedMoE.__module__}.FusedMoE.__init__", build, HookType.AROUND),
        (f"{_LOADER}._get_weights_iterator", without_experts, HookType.AROUND),
        (f"{runner}.load_model", check_served, HookType.AFTER),
        (f"{runner}.forward", begin_pass, HookType.BEFORE),
    ):
        pkgutil.resolve_name(target)  # SGLang would log a name that it does not find, and go on
        HookRegistry.register(target, hook, kind)


_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"


def build(original: Callable[..., None], layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
    """Around the constructor of a layer of experts."""
    given = inspect.signature(original).bind(layer, *args, **kwargs)
    given.apply_defaults()
    given.arguments["quant_method"] = CachedMethod(given.arguments)
    original(*given.args, **given.kwargs)


def without_experts(original: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any) -> Any:
    """Around the loader's iterator over (name, tensor); tensors are mapped, not read, till used."""
    skipped = {name for cache in _caches.values() for name in cache.store.tensor_names()}
    return (one for one in original(*args, **kwargs) if one[0] not in skipped)


def check_served(_: Any, runner: Any) -> None:
    """After a model is loaded."""
    ours = [one for one in runner.model.modules() if isinstance(one, CachedMethod)]
    if not ours:
        raise UnsupportedError(
            f"moeinf: {type(runner.model).__name__}: no layer of experts is SGLang's FusedMoE: "
            "unset MOEINF_SGLANG"
        )


def begin_pass(_: Any, batch: Any, *__: Any, **___: Any) -> None:
    """Before a forward pass. It is a prompt's if any of its sequences has more than one token."""
    prompt = batch.forward_mode.is_extend()
    for cache in _caches.values():
        cache.begin_pass(ForwardPass(prefill=prompt, new_sequence=prompt))


def cache_of_model() -> ExpertCache:
    """The cache of the model that is being built, the same for all of its layers."""
    server = get_server_args()
    if server.model_path not in _caches:
        _check(server)
        store = ExpertStore.open(server.model_path, server.revision)
        device = torch.get_default_device()
        _caches[server.model_path] = ExpertCache(store, device=device, **_options)
    return _caches[server.model_path]


def _check(server: Any) -> None:
    refused = {
        "--enable-paged-experts": server.enable_paged_experts,
        "--kt-weight-path": server.kt_weight_path,
        "--enable-eplb": server.enable_eplb,
        "--speculative-algorithm": server.speculative_algorithm,
        "--weight-loader-disable-mmap": server.weight_loader_disable_mmap,
        "--weight-loader-prefetch-checkpoints": server.weight_loader_prefetch_checkpoints,
    }
    for flag, wanted in refused.items():
        if wanted:
            raise UnsupportedError(f"moeinf: experts come out of our cache: leave out {flag}")
    if server.tp_size != server.ep_size:
        raise UnsupportedError(f"moeinf: experts are not split: add --ep-size {server.tp_size}")
    if torch.get_default_device().type == "cuda" and not cuda_graph_fully_disabled():
        raise UnsupportedError(
            "moeinf: a CUDA graph would replay stale memory: add --disable-prefill-cuda-graph "
            "--disable-decode-cuda-graph"
        )


class CachedMethod(FusedMoEMethodBase, torch.nn.Module):  # type: ignore[misc]
    """Computes the experts of one layer out of the cache. `given`: what FusedMoE is made of."""

    def __init__(self, given: dict[str, Any]) -> None:
        torch.nn.Module.__init__(self)
        self.cache = cache_of_model()
        scale = given["routed_scaling_factor"]
        self.number = check_layer(
            self.cache.store,
            "SGLang",
            given["prefix"],
            given["layer_id"],
            experts=given["num_experts"],
            hidden=given["hidden_size"],
            activation=given["activation"],
            gated=given["is_gated"],
            alpha=given["gemm1_alpha"],
            limit=given["gemm1_clamp_limit"] or given["swiglu_limit"],
            offset=given["gemm1_beta"],
            biases=given["with_bias"],
            a_method_of_the_model=given["quant_method"] is not None,
            routing_weights_on_the_inputs=given["apply_router_weight_on_input"],
            outputs_scaled_on_some_devices=scale not in (None, 1.0),
            an_output_for_each_route=given["no_combine"],
        )

    def create_weights(self, layer: FusedMoE, *_: Any, **__: Any) -> None:
        self.first = layer.moe_ep_rank * layer.num_local_experts

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
        self.runner = None

    def apply(  # type: ignore[override]  # SGLang's, and torch's other one is not called
        self, layer: FusedMoE, dispatch_output: Any
    ) -> StandardCombineInput:
        routes = dispatch_output.topk_output
        if not TopKOutputChecker.format_is_standard(routes):
            raise UnsupportedError(f"moeinf: {layer.layer_name}: routes as {routes.format}")
        ids = routes.topk_ids
        if layer.moe_ep_size > 1:  # ids of this rank, -1 for those of others, who add theirs
            ids = torch.where(ids >= 0, ids + self.first, -1)
        x = dispatch_output.hidden_states
        y = fused_experts(x, ids, routes.topk_weights, self.cache, self.number)
        return StandardCombineInput(hidden_states=y)

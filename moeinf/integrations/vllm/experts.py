"""Replaces vLLM's experts of a layer: no weights, and a forward out of the cache.

    the model is built      CachedMethod instead of vLLM's own: no weights are made
    its weights are read    tensors of experts are skipped, fused ones too
    the model is loaded     fails where no layer became ours
    a pass runs             an operator, opaque for compiled models too: says the pass, computes

Two ways in. `RoutedExperts` is replaced for models of any quantisation where --additional-config
speaks of moeinf. --quantization moeinf says it openly, for checkpoints without one.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import weight_utils
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from moeinf.cache.cache import ExpertCache, named
from moeinf.cache.passes import ForwardPass
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.experts.op import fused_experts
from moeinf.integrations.layers import check_layer
from moeinf.integrations.options import checked
from moeinf.integrations.vllm import metrics

# Activations of vLLM that are gate functions: alpha and limit, where the layer says none.
CONSTANTS = {"swigluoai": (1.702, 7.0), "swiglustep": (1.0, 7.0)}
_library = torch.library.Library("moeinf_vllm", "DEF")
_library.define("experts(Tensor x, Tensor ids, Tensor weights, str cache, int layer) -> Tensor")
_caches: dict[str, ExpertCache] = {}
_never_read: set[str] = set()


def install() -> None:
    """Once or more often. A plugin that replaced `RoutedExperts` before us keeps it."""
    if op_registry_oot.get(RoutedExperts.__name__) is CachedExperts:
        return
    register_quantization_config("moeinf")(CachedQuantization)
    if RoutedExperts.__name__ not in op_registry_oot:
        RoutedExperts.register_oot(CachedExperts)
    metrics.install()
    skips = weight_utils.should_skip_weight
    weight_utils.should_skip_weight = lambda name, ids: name in _never_read or skips(name, ids)
    loads = BaseModelLoader.load_model

    def load(self: BaseModelLoader, vllm_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        model: torch.nn.Module = loads(self, vllm_config, *args, **kwargs)
        if options(vllm_config) is not None:
            check_served(model)
        return model

    BaseModelLoader.load_model = load


def check_served(model: torch.nn.Module) -> None:
    """Raises UnsupportedError where the cache computes no layer of the model."""
    methods = (getattr(layer, "quant_method", None) for layer in model.modules())
    if not any(isinstance(one, CachedMethod) for one in methods):
        raise UnsupportedError(
            f"moeinf: {type(model).__name__}: no layer of experts is vLLM's RoutedExperts: leave "
            "moeinf out of --additional-config"
        )


def options(config: Any = None) -> dict[str, Any] | None:
    """What --additional-config says of moeinf. ValueError for what nobody knows."""
    given = (config or get_current_vllm_config()).additional_config
    found = given.get("moeinf") if isinstance(given, dict) else None
    return None if found is None else checked(found, "--additional-config")


def cache_of_model() -> ExpertCache:
    """The cache of the model that is being built, the same for all of its layers."""
    config = get_current_vllm_config()
    path = config.model_config.model
    if path not in _caches:
        _check(config)
        store = ExpertStore.open(path, config.model_config.revision)
        device = torch.get_default_device()
        _caches[path] = ExpertCache(store, device=device, **(options() or {}))
        _never_read.update(store.tensor_names())
    return _caches[path]


def _check(config: Any) -> None:
    parallel = config.parallel_config
    if parallel.tensor_parallel_size > 1 and not parallel.enable_expert_parallel:
        raise UnsupportedError("moeinf: experts are not split: add --enable-expert-parallel")
    if parallel.enable_eplb:
        raise UnsupportedError("moeinf: experts do not move between ranks: leave out --enable-eplb")
    if config.speculative_config is not None:
        raise UnsupportedError("moeinf: one model a process: leave out --speculative-config")
    extra = config.load_config.model_loader_extra_config
    if isinstance(extra, dict) and extra.get("enable_multithread_load"):
        raise UnsupportedError(
            "moeinf: experts are not to be read: leave enable_multithread_load out of "
            "--model-loader-extra-config"
        )
    graphs = config.compilation_config.cudagraph_mode
    if torch.get_default_device().type == "cuda" and graphs not in (None, CUDAGraphMode.NONE):
        raise UnsupportedError(
            f"moeinf: a CUDA graph ({graphs.name}) would replay stale memory: add "
            "-cc.cudagraph_mode=NONE, or --enforce-eager"
        )


def _pass_of(attention: Any) -> ForwardPass:
    """A pass is a prompt's if any of its sequences has more than one token in it."""
    one = next(iter(attention.values())) if isinstance(attention, dict) else attention
    prompt = getattr(one, "max_query_len", 1) > 1
    return ForwardPass(prefill=prompt, new_sequence=prompt)


def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, name: str, layer: int
) -> torch.Tensor:
    cache = named(name)
    if is_forward_context_available():
        attention = get_forward_context().attn_metadata
        if attention is None:
            return torch.zeros_like(x)  # a run that measures memory, of no text
        if layer == 0:
            cache.begin_pass(_pass_of(attention))
    return fused_experts(x, ids, weights, cache, layer)


for _device in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _device)
torch.library.register_fake(
    "moeinf_vllm::experts", lambda x, *_: x.new_empty(x.shape), lib=_library
)


class CachedMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Computes the experts of one layer out of the cache."""

    def __init__(self, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.cache = cache_of_model()
        self.number = -1

    def create_weights(self, layer: RoutedExperts, *_: Any, **__: Any) -> None:
        activation, moe = layer.activation.value.removesuffix("_uninterleave"), layer.moe_config
        alpha, limit = CONSTANTS.get(activation, (None, None))
        numbers = [int(part) for part in layer.layer_name.split(".") if part.isdigit()]
        self.number = check_layer(
            self.cache.store,
            "vLLM",
            layer.layer_name,
            numbers[-1] if numbers else None,
            experts=layer.global_num_experts,
            hidden=layer.hidden_size,
            activation="silu" if limit else activation.removesuffix("_no_mul"),
            gated=not activation.endswith("_no_mul"),
            alpha=layer.swiglu_alpha or alpha,
            limit=layer.swiglu_limit or limit,
            offset=layer.swiglu_beta,
            biases=moe.has_bias,
            routing_weights_on_the_inputs=layer.apply_router_weight_on_input,
            adapters_of_experts=moe.is_lora_enabled,
        )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        if layer.expert_map is not None:  # of this rank's experts: the others add theirs
            here = layer.expert_map[topk_ids.long()] >= 0
            topk_ids = torch.where(here, topk_ids, -1)
        return torch.ops.moeinf_vllm.experts(
            x, topk_ids, topk_weights, self.cache.name, self.number
        )


class CachedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's class; its own where nothing is said of moeinf."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if options() is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        return CachedMethod(moe_config, prefix)


class CachedQuantization(QuantizationConfig):  # type: ignore[misc]
    """--quantization moeinf."""

    def get_name(self) -> str:
        return "moeinf"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CachedQuantization:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return CachedMethod(layer.moe_config, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

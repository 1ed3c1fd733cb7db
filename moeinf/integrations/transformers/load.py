"""transformers: an ordinary `PreTrainedModel` whose experts are served by the cache.

The experts are never built. The model class is instantiated on the meta device with its expert
parameters left out, the library loads everything else, and the registered experts implementation
"moeinf" computes out of the cache's slots.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch

from moeinf import _core
from moeinf.cache.cache import ExpertCache
from moeinf.cache.devices import pick_device
from moeinf.cache.group import CacheGroup
from moeinf.cache.passes import ForwardPass
from moeinf.checkpoint.families import parse
from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.experts.op import fused_experts
from moeinf.integrations.transformers.device_map import DeviceMap, Placement
from moeinf.integrations.transformers.form import check_form
from moeinf.integrations.transformers.lookahead import GateLookahead
from moeinf.integrations.transformers.routers import listen
from moeinf.integrations.transformers.whole import make_whole_experts, whole_model

try:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        GenerationConfig,
        PreTrainedModel,
    )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError("moeinf.load needs transformers >= 5: pip install 'moeinf[hf]'") from error

IMPLEMENTATION = "moeinf"
GATE = "gate"


def load(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    device_map: DeviceMap | str | None = None,
    memory: str | int | None = None,
    slots: int | None = None,
    policy: str = "learned",
    prefetch: str = "off",
    dtype: torch.dtype | str = "auto",
    **cache_options: Any,
) -> PreTrainedModel:
    """Loads a Mixture-of-Experts checkpoint with its experts behind a cache.

    Args:
        path: a checkpoint folder (safetensors), a name on the Hugging Face Hub such as
            Qwen/Qwen3-30B-A3B, or a checkpoint already opened.
        revision: branch, tag or commit on the Hub; without it, the main branch.
        device: where the model computes and the slots lie: "cpu", "cuda", "cuda:N", or "auto", a
            GPU where torch and the core can both use one. `stats()["device"]` says which it was.
        device_map: instead of `device`, module paths and their devices, as accelerate writes them,
            or "auto", by free GPU memory. Over several GPUs the experts of a layer lie where the
            layer does, and `model.moeinf.cache` is a `CacheGroup`: one RAM tier, and `memory` or
            `slots` of each GPU.
        memory: what the slots may take: bytes (`"2GiB"`), a share of all experts (`"25%"`), or
            "auto", what the rest of the model leaves free, less a reserve; or
        slots: their count. Without either, every expert is kept once read; on a GPU "auto".
        policy: who leaves when a slot is needed.
        prefetch: what guesses which experts come next: "off", "gate" (the next layer's router, run
            early) or what `ExpertCache` takes.
        dtype: of activations and of all weights but the experts', which stay as they are stored;
            "auto" takes the checkpoint's own.
        cache_options: passed to `ExpertCache`, `eamc`, `host_memory` and `exclusive` among them.

    Returns:
        The model in evaluation mode. `model.moeinf` has `stats()`, `reset_stats()` and `cache`.

    Raises:
        CheckpointError: the checkpoint is damaged, or its experts do not fit the model.
        CapacityError: the budget is below one slot, or the memory cannot be had.
        UnsupportedError: experts of a form the kernels do not have, or a device that cannot be
            used here.
    """
    known = [*_core.prefetch_names(), GATE]
    if prefetch not in known:
        raise ValueError(f"no prefetch is named {prefetch!r}; there are: {', '.join(known)}")
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, revision)
    store = ExpertStore.open(checkpoint)
    config = _config(checkpoint)
    dense = {name: entry for name, entry in checkpoint.tensors.items() if parse(name) is None}
    # Before the model, so that a budget that cannot work says so before anything large is read.
    base = _model_class(config, checkpoint)
    options = {
        "memory": memory,
        "slots": slots,
        "policy": policy,
        "prefetch": "external" if prefetch == GATE else prefetch,
        **cache_options,
    }
    placed = None
    if device_map is not None:
        if device != "auto":
            raise ValueError("give device or device_map, not both")
        skeleton = _skeleton(base, config)
        layers = _match_layers(_experts_modules(skeleton), store)
        placed = Placement(device_map, skeleton, [path for path, _ in layers])
    cache: ExpertCache | CacheGroup
    only = pick_device(device) if placed is None else placed.only
    if only is not None:
        cache = ExpertCache(
            store,
            device=only,
            dense_bytes=sum(entry.nbytes for entry in dense.values()),
            **options,
        )
    elif placed is not None and prefetch != GATE:
        cache = CacheGroup(store, placed.experts, dense_bytes=placed.dense_bytes, **options)
    else:
        raise UnsupportedError("prefetch='gate' runs a router early: give one device")
    model: Any = _without_experts(base).from_pretrained(
        None,
        config=config,
        state_dict={name: _OnDemand(entry) for name, entry in dense.items()},
        dtype=_dtype(dtype, config, store),
        experts_implementation="eager",
    )
    # Set afterwards, for transformers 5.0 checks the argument against a list of its own.
    model.config._experts_implementation = IMPLEMENTATION
    model.__class__ = whole_model(base)
    if isinstance(cache, CacheGroup) and placed is not None:
        placed.dispatch(model, cache.device)
    else:
        model.to(cache.device)
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.config.name_or_path = str(checkpoint.path)
    model.moeinf = ServedExperts(model, cache, gate_lookahead=prefetch == GATE)
    return model


class ServedExperts:
    """What connects a model to its cache; the model's `moeinf` attribute."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ExpertCache | CacheGroup,
        *,
        gate_lookahead: bool = False,
    ):
        self.cache = cache
        modules = _match_layers(_experts_modules(model), cache.store)
        for layer, (name, module) in enumerate(modules):
            check_form(name, module, cache.store)
            make_whole_experts(module, cache.store.form)
            module.moeinf_layer = layer
            module.moeinf_cache = cache if isinstance(cache, ExpertCache) else cache.of(layer)
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in modules]
        cache.routers = partial(listen, blocks)
        self.lookahead = None
        if gate_lookahead and isinstance(cache, ExpertCache):
            self.lookahead = GateLookahead(blocks, cache)
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def stats(self) -> dict[str, Any]:
        """See `ExpertCache.stats`."""
        stats = self.cache.stats()
        if self.lookahead is not None:
            stats["prefetch"]["predictor"] = GATE
        return stats

    def reset_stats(self) -> None:
        """See `ExpertCache.reset_stats`."""
        self.cache.reset_stats()

    def _before_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Tells the cache whether this pass reads a prompt, and whether it begins a request."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        past = kwargs.get("past_key_values")
        begins = past is None or past.get_seq_length() == 0
        self.cache.begin_pass(
            ForwardPass(
                prefill=begins or (tokens is not None and tokens.shape[1] > 1),
                new_sequence=begins,
                batch=1 if tokens is None else tokens.shape[0],
            )
        )


class _OnDemand:
    """A tensor that is read when indexed: what the library's loader does with each in turn."""

    def __init__(self, entry: TensorEntry):
        self.entry = entry

    def __getitem__(self, _: Any) -> torch.Tensor:
        return read_tensor(self.entry)


def _experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H]."""
    cache = getattr(self, "moeinf_cache", None)
    if cache is None:
        raise UnsupportedError(
            f"{type(self).__name__}: experts_implementation={IMPLEMENTATION!r} serves models "
            "that moeinf.load loaded"
        )
    return fused_experts(hidden_states, top_k_index, top_k_weights, cache, self.moeinf_layer)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _config(checkpoint: Checkpoint) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint.path)
    except (ValueError, KeyError) as error:
        kind = checkpoint.config.get("model_type")
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: transformers does not know model_type {kind!r}: "
            f"{error}"
        ) from error


def _model_class(config: Any, checkpoint: Checkpoint) -> type[PreTrainedModel]:
    try:
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return known
    except KeyError:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: model_type {config.model_type!r} is not a causal "
            "language model of this transformers version"
        ) from None


def _skeleton(base: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return _without_experts(base)(copy.deepcopy(config))


def _without_experts(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `base` whose expert parameters are left out right after construction."""

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for _, module in _experts_modules(self):
            # Kept to check the checkpoint's shapes against.
            module.moeinf_expected = {
                name: tuple(parameter.shape) for name, parameter in module.named_parameters()
            }
            for name in module.moeinf_expected:
                module.register_parameter(name, None)
            module._is_hf_initialized = True

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def _experts_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold all experts of one layer, in the order of layers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    ]


def _match_layers(modules: list[tuple[str, Any]], store: ExpertStore) -> list[tuple[str, Any]]:
    """Pairs the model's experts modules with the store's MoE layers, by layer number."""
    found = [
        int(next(part for part in reversed(name.split(".")) if part.isdigit()))
        for name, _ in modules
    ]
    if found != store.layer_ids:
        odd = sorted(set(found) ^ set(store.layer_ids))
        raise CheckpointError(
            f"{store.checkpoint.path}: the model has experts in {len(found)} layers, the files in "
            f"{store.num_layers}; they differ at layer {odd[0] if odd else '?'}"
        )
    return modules


def _dtype(dtype: torch.dtype | str, config: Any, store: ExpertStore) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        declared = getattr(config, "dtype", None) or getattr(
            config.get_text_config(), "dtype", None
        )
        return declared or store.layout["down"].dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: expected auto, bfloat16, float16 or float32")
    return found

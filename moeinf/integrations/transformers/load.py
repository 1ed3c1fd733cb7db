"""transformers: an ordinary `PreTrainedModel` whose experts are served by the cache.

The experts are never built. The model class is instantiated on the meta device with its expert
parameters left out, the library loads everything else, and the registered experts implementation
"moeinf" computes out of the cache's slots.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from moeinf import _core, profiles
from moeinf.cache.cache import ExpertCache
from moeinf.cache.devices import pick_device
from moeinf.cache.group import CacheGroup
from moeinf.checkpoint.copies import paths_of
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.experts.checks import check_routes
from moeinf.experts.cpu import use_threads
from moeinf.experts.linear import serve_linear
from moeinf.integrations.transformers.attention import serve_attention
from moeinf.integrations.transformers.caches import make_caches
from moeinf.integrations.transformers.dense import choose_dense, load_dense
from moeinf.integrations.transformers.device_map import DeviceMap, Placement, stack_of
from moeinf.integrations.transformers.experts import experts_modules
from moeinf.integrations.transformers.lookahead import GateLookahead
from moeinf.integrations.transformers.models import DTYPES, model_of
from moeinf.integrations.transformers.norms import serve_norms
from moeinf.integrations.transformers.passes import PassReader, generating
from moeinf.integrations.transformers.plan import make_plan
from moeinf.integrations.transformers.residuals import serve_residuals
from moeinf.integrations.transformers.routers import listen
from moeinf.integrations.transformers.served import IMPLEMENTATION, serve
from moeinf.integrations.transformers.top_k import serve_routers
from moeinf.integrations.transformers.torch_threads import TorchThreads
from moeinf.integrations.transformers.whole import make_whole_experts, whole_model

GATE = "gate"
LINEAR = ("auto", "torch")
DENSE = ("decoded", "packed", "auto")


def load(
    path: str | bytes | os.PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "auto",
    device_map: DeviceMap | str | None = None,
    memory: str | int | None = None,
    slots: int | None = None,
    policy: str | None = None,
    prefetch: str | None = None,
    dtype: torch.dtype | str = "auto",
    linear: str = "auto",
    dense: str = "decoded",
    threads: int | None = None,
    fill: bool = False,
    also: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    tuned: bool = True,
    **cache_options: Any,
) -> PreTrainedModel:
    """Loads a Mixture-of-Experts checkpoint with its experts behind a cache.

    Args:
        path: a checkpoint folder (safetensors), a GGUF file, a name on the Hugging Face Hub such as
            Qwen/Qwen3-30B-A3B, or a checkpoint already opened.
        revision: branch, tag or commit on the Hub; without it, the main branch.
        trust_remote_code: run code that comes with the checkpoint, where `auto_map` of its
            configuration names it. Its experts must use transformers' experts interface.
        device: where the model computes and the slots lie: "cpu", "cuda", "cuda:N", or "auto", a
            GPU where torch and the core can both use one. `stats()["device"]` says which it was.
        device_map: instead of `device`, module paths and their devices, as accelerate writes them,
            or "auto", by free GPU memory. Over several GPUs the experts of a layer lie where the
            layer does, and `model.moeinf.cache` is a `CacheGroup`: one RAM tier, and `memory` or
            `slots` of each GPU.
        memory: what the slots may take: bytes (`"2GiB"`), a share of all experts (`"25%"`), or
            "auto", what the rest of the model leaves free, less a reserve; or
        slots: their count. Without either, every expert is kept once read; on a GPU "auto".
        policy: who leaves when a slot is needed; without it "learned".
        prefetch: what guesses which experts come next: "off", "gate" (the next layer's router, run
            early) or what `ExpertCache` takes; without it "off".
        dtype: of activations and of all weights but the experts', which stay as they are stored;
            "auto" takes the checkpoint's own.
        linear: which kernels compute linear layers of a few tokens on the CPU: "auto", those of the
            experts, or "torch".
        dense: of a quantised checkpoint, linear layers outside the experts: "decoded" when they are
            loaded; "packed", as they are stored, for the kernels of the experts on the CPU; or
            "auto", as the commands have it: packed on the CPU, else decoded. A packed layer takes a
            half or a quarter of the memory, and its `weight` cannot be written to. Embeddings, tied
            weights, and weights that transformers makes of several tensors are decoded either way.
        threads: of the kernels of experts and linear layers on the CPU, for the whole process;
            without it, as many as torch uses and the process may use: see `moeinf doctor`.
        fill: where the slots hold every expert, read them all from now on, in the background; see
            `ExpertCache.fill`. The commands do.
        also: folders on other disks with copies of the checkpoint's files, or of some of them; see
            `ExpertStore.open`.
        tuned: of `policy`, `prefetch`, `threads`, `reader_threads` and `chunk_bytes`, what is not
            given is as `moeinf tune` has found it for this checkpoint and machine, if it has. If it
            has found that prompt lookup costs more than it gains, `generate` does without.
        cache_options: passed to `ExpertCache`, `eamc`, `host_memory` and `exclusive` among them.

    Returns:
        The model in evaluation mode. `model.moeinf` has `stats()`, `reset_stats()` and `cache`.
        A graph of torch.compile that holds the whole decoder (`fullgraph=True`) computes the same,
        and tells nobody of its passes: call `model.moeinf.cache.begin_pass` before each, for
        policies, predictions and traces.

    Raises:
        CheckpointError: the checkpoint is damaged, or its experts do not fit the model.
        CapacityError: the budget is below one slot, or the memory cannot be had.
        UnsupportedError: experts of a form the kernels do not have, or a device that cannot be
            used here.
    """
    known = [*_core.prefetch_names(), GATE]
    if prefetch is not None and prefetch not in known:
        raise ValueError(f"no prefetch is named {prefetch!r}; there are: {', '.join(known)}")
    if linear not in LINEAR:
        raise ValueError(f"linear={linear!r}: expected one of {', '.join(LINEAR)}")
    if dense not in DENSE:
        raise ValueError(f"dense={dense!r}: expected one of {', '.join(DENSE)}")
    if dense == "packed" and linear == "torch":
        raise ValueError("dense='packed' has no kernels of torch: give linear='auto'")
    checkpoint = (
        path if isinstance(path, Checkpoint) else open_checkpoint(path, revision, trust_remote_code)
    )
    base, config = model_of(checkpoint)
    plan = make_plan(base, config, checkpoint)
    for store in plan.stores:
        store.also = paths_of(also)
    chosen: dict[str, Any] = {"policy": "learned", "prefetch": "off", "threads": None}
    if tuned and device_map is None and profiles.any_here():
        kind = torch.device(pick_device(device)).type
        chosen |= profiles.settings_for(plan.stores[0].fingerprint, kind)
    given = {"policy": policy, "prefetch": prefetch, "threads": threads, **cache_options}
    chosen |= {name: value for name, value in given.items() if value is not None}
    prefetch = chosen.pop("prefetch")
    speculation = chosen.pop("speculation", True)
    if (threads := chosen.pop("threads")) is not None:
        use_threads(threads)
    # Before the model, so that a budget that cannot work says so before anything large is read.
    options = {
        "memory": memory,
        "slots": slots,
        "prefetch": "external" if prefetch == GATE else prefetch,
        **chosen,
    }
    placed = None
    if device_map is not None:
        if device != "auto":
            raise ValueError("give device or device_map, not both")
        placed = Placement(device_map, plan.skeleton, [*experts_modules(plan.skeleton)])
        if placed.only is None and prefetch == GATE:
            raise UnsupportedError("prefetch='gate' runs a router early: give one device")
    where = pick_device(device) if placed is None else placed.only
    weights = choose_dense(plan, where, dense if linear == "auto" else "decoded")
    computes_in = computing_dtype(dtype, config, plan.stores[0])
    caches = make_caches(
        plan.stores,
        device=where,
        placed=placed,
        dense_bytes=weights.bytes_loaded_as(computes_in),
        **options,
    )
    check_routes(plan.stores[0].top_k, caches[0].device.type, checkpoint.config_file)
    for cache in caches:
        if fill and isinstance(cache, ExpertCache):
            cache.fill()
    model: Any = load_dense(base, config, plan, weights, computes_in)
    # Set afterwards, for transformers 5.0 checks the argument against a list of its own.
    model.config._experts_implementation = IMPLEMENTATION
    model.__class__ = generating(whole_model(base))
    if placed is not None and placed.only is None:
        placed.dispatch(model, caches[0].device)
    else:
        model.to(caches[0].device)
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.config.name_or_path = str(checkpoint.path)
    model.moeinf = ServedExperts(model, caches, plan.tied, gate_lookahead=prefetch == GATE)
    model.moeinf.speculation = speculation
    if linear == "auto" and caches[0].device.type == "cpu":
        serve_linear(model)
        serve_norms(model)
        serve_attention(model)
        serve_residuals(model)
        serve_routers(model)
        model.moeinf.torch_threads = TorchThreads(model)
    return model


def open_checkpoint(
    path: str | bytes | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    to_generate: bool = False,
) -> Checkpoint:
    """Opens a checkpoint; fetches it from the Hub only if its headers say that it can be served.

    `to_generate`: refuses a model that does not write text.
    """
    with Checkpoint.peek(path, revision, trust_remote_code) as found:
        base, config = model_of(found)
        if to_generate and not base.can_generate():
            raise UnsupportedError(
                f"{found.config_file}: {base.__name__} does not write text; moeinf.load serves it"
            )
        if found.has_weights:
            return found
        make_plan(base, config, found)
    return Checkpoint.open(path, revision, trust_remote_code)


class ServedExperts:
    """What connects a model to its cache; the model's `moeinf` attribute."""

    def __init__(
        self,
        model: PreTrainedModel,
        caches: list[ExpertCache | CacheGroup],
        tied: Mapping[str, str],
        *,
        gate_lookahead: bool = False,
    ):
        self.caches = caches
        self.cache = cache = caches[0]
        served = {
            path: (one, layer) for one in caches for layer, path in enumerate(one.store.modules)
        }
        for path in [*served, *tied]:
            one, layer = served[tied.get(path, path)]
            module: Any = model.get_submodule(path)
            block = model.get_submodule(path.rpartition(".")[0])
            make_whole_experts(module, one.store.form)
            serve(module, one if isinstance(one, ExpertCache) else one.of(layer), layer, block)
            module.config._experts_implementation = IMPLEMENTATION
        blocks = [model.get_submodule(path.rpartition(".")[0]) for path in cache.store.modules]
        # Weakly, for the blocks refer to the cache: a model that is no longer used is gone at once.
        known = [weakref.ref(block) for block in blocks]
        cache.routers = lambda sink: listen([block for ref in known if (block := ref())], sink)
        self.lookahead = None
        if gate_lookahead and isinstance(cache, ExpertCache):
            self.lookahead = GateLookahead(blocks, cache)
        modules = cache.store.modules
        if model.config.is_encoder_decoder:  # the passes of a text are those of the decoder
            modules = [path for path in modules if "decoder" in path.split(".")] or modules
        decoder = stack_of(modules).rpartition(".")[0]
        self.torch_threads: TorchThreads | None = None
        self.speculation = True  # by prompt lookup, where `generate` asks for it
        self.passes = PassReader(model.get_submodule(decoder), caches)

    def stats(self) -> dict[str, Any]:
        """See `ExpertCache.stats`. Where there is more than one cache, `others` is of the rest."""
        stats, *others = [cache.stats() for cache in self.caches]
        if self.lookahead is not None:
            stats["prefetch"]["predictor"] = GATE
        return {**stats, "others": others} if others else stats

    def reset_stats(self) -> None:
        """See `ExpertCache.reset_stats`."""
        for cache in self.caches:
            cache.reset_stats()


def computing_dtype(dtype: torch.dtype | str, config: Any, store: ExpertStore) -> torch.dtype:
    """Of activations and of all weights but the experts'; "auto" is the checkpoint's own."""
    if dtype == "auto":
        stored = store.layout.down.format
        dtype = (
            getattr(config, "dtype", None)
            or getattr(config.get_text_config(), "dtype", None)
            or (stored.values if str(stored.values)[6:] in DTYPES else torch.bfloat16)
        )
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r}: expected auto or one of {', '.join(DTYPES)}")
    return found

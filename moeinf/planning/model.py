"""What one token of a model needs: layers, experts, and bytes of everything else."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch

from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.formats import PLAIN_FORMATS
from moeinf.checkpoint.layout import Layout
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.packing.palettes import BF16_PALETTE, palette_layout
from moeinf.packing.quantised import quantised_layout
from moeinf.packing.targets import TARGETS


@dataclass(frozen=True)
class ModelCosts:
    """
    stores       the experts
    layers       of the decoder, those without experts among them
    dense_bytes  that each token reads of all other weights, as the commands keep them on the CPU
    loaded_bytes memory that these and the rest of the model take
    top_k        experts of each layer that a token is routed to
    dtype        of activations and of the other weights
    """

    stores: list[ExpertStore]
    layers: int
    dense_bytes: int
    loaded_bytes: int
    top_k: int
    dtype: torch.dtype

    @property
    def total_experts(self) -> int:
        return sum(store.num_layers * store.num_experts for store in self.stores)

    def layouts(self) -> dict[str, Layout]:
        """The layout of an expert of the first store, by format: its own, and those of a pack."""
        store = self.stores[0]
        found = {store.layout.format_names: store.layout}
        if all(one.format in PLAIN_FORMATS.values() for one in store.layout.named.values()):
            for name in TARGETS:
                try:
                    layout = quantised_layout(store, TARGETS[name])
                except UnsupportedError:
                    continue
                if layout.nbytes < store.layout.nbytes:
                    found[name] = layout
            with suppress(UnsupportedError):
                layout = palette_layout(store)
                if layout.nbytes < store.layout.nbytes:
                    found[BF16_PALETTE] = layout
        return found


def read_model(checkpoint: Checkpoint) -> ModelCosts:
    """From the headers alone. Raises what `moeinf.load` would."""
    from moeinf.integrations.transformers.dense import choose_dense
    from moeinf.integrations.transformers.device_map import stack_of
    from moeinf.integrations.transformers.load import computing_dtype
    from moeinf.integrations.transformers.models import model_of
    from moeinf.integrations.transformers.plan import make_plan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that the model has no use for
        base, config = model_of(checkpoint)
        plan = make_plan(base, config, checkpoint)
    dtype = computing_dtype("auto", config, plan.stores[0])
    modules = [path for store in plan.stores for path in store.modules]
    stack = stack_of(modules)
    model = plan.skeleton
    looked_up = model.get_input_embeddings().weight
    out = model.get_output_embeddings()
    last = [] if out is None else [out.weight]
    weights = choose_dense(plan, "cpu")
    packed = {
        id(model.get_parameter(f"{path}.weight")): form.nbytes
        for path, (_, form) in weights.packed.items()
    }
    used = [
        parameter
        for path, parameter in model.named_parameters()
        if path.startswith(f"{stack}.") and parameter is not looked_up
    ]
    read = {
        id(parameter): packed.get(id(parameter), parameter.numel() * dtype.itemsize)
        for parameter in [*used, *last]
    }
    return ModelCosts(
        stores=plan.stores,
        layers=len(model.get_submodule(stack)),  # type: ignore[arg-type]
        dense_bytes=sum(read.values()),
        loaded_bytes=weights.bytes_loaded_as(dtype),
        top_k=plan.stores[0].top_k or plan.stores[0].num_experts,
        dtype=dtype,
    )

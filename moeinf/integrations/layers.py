"""A layer of experts as a runtime describes it, beside what the checkpoint says."""

from __future__ import annotations

import math

from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError


def check_layer(
    store: ExpertStore,
    runtime: str,
    name: str,
    number: int | None,
    *,
    experts: int,
    hidden: int,
    activation: str,
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    offset: float | None = None,
    biases: bool = False,
    **others: bool,
) -> int:
    """Which of the store's layers this is. For runtimes that compute the experts themselves too.

    Args:
        store: what would compute the layer.
        runtime: who describes it.
        name: of the layer there.
        number: of the layer in the model.
        experts, hidden: how many, and of how many inputs.
        activation, gated, alpha, limit, biases: see `moeinf.kernels.Gate` and `ExpertForm`.
        offset: what is added to the outputs of up; None: what the gate function adds.
        others: what the runtime adds to a layer; where it is true, nobody would compute it.

    Raises:
        UnsupportedError: the store would compute the layer in another way.
    """
    if number not in store.layer_ids:
        raise UnsupportedError(
            f"moeinf: {name}: the checkpoint has experts in layers {store.layer_ids}"
        )
    gate = store.form.gate
    adds = 1.0 if gate.function == "swiglu_oai" else 0.0
    found = {
        "experts": experts, "inputs": hidden, "activation": activation, "gated": gated,
        "alpha": alpha or 1.0, "limit": limit or math.inf,
        "offset": adds if offset is None else offset, "biases": biases, **others,
    }  # fmt: skip
    expected = {
        "experts": store.num_experts, "inputs": store.layout.hidden, "activation": gate.activation,
        "gated": store.form.has_gate, "alpha": gate.alpha, "limit": gate.limit,
        "offset": adds, "biases": store.form.has_bias, **dict.fromkeys(others, False),
    }  # fmt: skip
    for what, value in found.items():
        if value != expected[what]:
            raise UnsupportedError(
                f"moeinf: {name}: {what.replace('_', ' ')}: {runtime} has {value}, the checkpoint "
                f"{expected[what]}"
            )
    return store.layer_ids.index(number)

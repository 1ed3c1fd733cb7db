"""A runtime's layer beside the store that would compute it: equal, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moeinf
from moeinf.integrations.layers import check_layer
from moeinf.kernels import ExpertForm, Gate

FORMS = {
    "glu": (ExpertForm(), {}),
    "plain": (
        ExpertForm(Gate("plain", "relu2"), has_gate=False),
        {"activation": "relu2", "gated": False},
    ),
    "swiglu_oai": (
        ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True),
        {"alpha": 1.702, "limit": 7.0, "offset": 1.0, "biases": True},
    ),
    "clamped_glu": (ExpertForm(Gate("clamped_glu", limit=10.0)), {"limit": 10.0, "offset": 0.0}),
}


@pytest.mark.parametrize("name", FORMS)
def test_only_what_computes_the_same_is_served(name: str) -> None:
    form, said = FORMS[name]
    rows = 16 if form.has_gate else 8
    experts = {"gate_up" if form.has_gate else "gate": torch.zeros(4, rows, 32)}
    experts["down"] = torch.zeros(4, 32, 8)
    if form.has_bias:
        experts |= {"gate_up.bias": torch.zeros(4, rows), "down.bias": torch.zeros(4, 32)}
    store = moeinf.ExpertStore.from_tensors([experts], top_k=2, form=form)
    usual: dict[str, Any] = {"experts": 4, "hidden": 32, "activation": "silu"} | said
    assert check_layer(store, "runtime", "layer 0", 0, **usual, turned_over=False) == 0
    changes = {
        "experts": 5, "hidden": 64, "activation": "gelu", "gated": not form.has_gate, "alpha": 3.0,
        "limit": 3.0, "offset": 3.0, "biases": not form.has_bias, "turned_over": True,
    }  # fmt: skip
    for what, value in changes.items():
        with pytest.raises(moeinf.UnsupportedError, match=r"layer 0: .*: runtime has"):
            check_layer(store, "runtime", "layer 0", 0, **usual | {what: value})
    for number in (1, None):
        with pytest.raises(moeinf.UnsupportedError, match=r"has experts in layers \[0\]"):
            check_layer(store, "runtime", "layer 1", number, **usual)

"""A store can be made from an index of experts that the caller knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moeinf
from moeinf.checkpoint.folder import Checkpoint
from moeinf.checkpoint.index import Slice, split_fused
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError
from moeinf.integrations.transformers.form import form_of
from moeinf.kernels.forms import ExpertForm, Gate

EXPERTS, HIDDEN, INTER = 3, 5, 7
OAI = ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True)
PLAIN = ExpertForm(Gate("plain", "relu2"), has_gate=False)
SIZES = {
    "wi": (EXPERTS, 2 * INTER, HIDDEN),
    "wi_b": (EXPERTS, 2 * INTER),
    "wo": (EXPERTS, HIDDEN, INTER),
    "wo_b": (EXPERTS, HIDDEN),
    "up": (EXPERTS, INTER, HIDDEN),
}
KEYS = {
    "wi": ("gate_up", "values"),
    "wi_b": ("gate_up", "bias"),
    "wo": ("down", "values"),
    "wo_b": ("down", "bias"),
    "up": ("gate", "values"),
}
INTERLEAVED = ("wi", "wi_b", "wo", "wo_b")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Two layers whose tensors no naming knows."""
    torch.manual_seed(0)
    (tmp_path / "config.json").write_text(json.dumps({}))
    tensors = {f"L{layer}/{n}": torch.randn(s) for layer in range(2) for n, s in SIZES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def index_of(checkpoint: Checkpoint, names: tuple[str, ...]) -> dict[str, list[dict[Any, Slice]]]:
    index = {}
    for layer in range(2):
        slices = {n: split_fused(checkpoint.tensors[f"L{layer}/{n}"], EXPERTS) for n in names}
        index[f"stack.{layer}.moe"] = [
            {KEYS[name]: slices[name][expert] for name in names} for expert in range(EXPERTS)
        ]
    return index


def tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(checkpoint.path / "model.safetensors")[name]


def test_rows_in_turn_and_biases(checkpoint: Checkpoint) -> None:
    index = index_of(checkpoint, INTERLEAVED)
    store = ExpertStore(checkpoint, index, form=OAI, top_k=2, interleaved=True)
    assert (store.modules, store.layer_ids) == (["stack.0.moe", "stack.1.moe"], [0, 1])
    assert (store.num_experts, store.top_k, store.form) == (EXPERTS, 2, OAI)
    assert len(store.tensor_names()) == 8
    for layer in range(2):
        wanted = {n: tensor(checkpoint, f"L{layer}/{n}") for n in INTERLEAVED}
        for expert in range(EXPERTS):
            slot = torch.full((1, store.slot_bytes), 255, dtype=torch.uint8)
            for extent in store.extents(layer, expert):
                raw = Path(extent.entry.path).read_bytes()[extent.file_offset :][: extent.nbytes]
                end = extent.slot_offset + extent.nbytes
                slot[0, extent.slot_offset : end] = torch.frombuffer(
                    bytearray(raw), dtype=torch.uint8
                )
            found = store.layout.matrices(slot)
            assert found.up is not None and found.gate.bias is not None
            assert found.up.bias is not None and found.down.bias is not None
            assert torch.equal(found.gate.values[0], wanted["wi"][expert, 0::2])
            assert torch.equal(found.up.values[0], wanted["wi"][expert, 1::2])
            assert torch.equal(found.gate.bias[0], wanted["wi_b"][expert, 0::2])
            assert torch.equal(found.up.bias[0], wanted["wi_b"][expert, 1::2])
            assert torch.equal(found.down.values[0], wanted["wo"][expert])
            assert torch.equal(found.down.bias[0], wanted["wo_b"][expert])


def test_experts_without_a_gate(checkpoint: Checkpoint) -> None:
    index = index_of(checkpoint, ("up", "wo"))
    store = ExpertStore(checkpoint, index, form=PLAIN, top_k=1)
    assert store.layout.up is None
    assert torch.equal(store.read(1, 2)["gate"], tensor(checkpoint, "L1/up")[2])
    assert torch.equal(store.read(1, 2)["down"], tensor(checkpoint, "L1/wo")[2])


@pytest.mark.parametrize(
    "names, options, message",
    [
        (INTERLEAVED, {"form": ExpertForm()}, r"L0/wo_b .*holds its down bias, expected none"),
        (("wi", "wo"), {"form": OAI}, "expert 0: no tensor for its down bias and gate_up bias"),
        (("wi", "wo"), {"form": PLAIN}, "expert 0: no tensor for its gate"),
        (("up", "wi", "wo"), {"form": ExpertForm()}, r"L0/up .*holds its gate values, expected no"),
        (("up", "wo"), {"form": ExpertForm()}, "expert 0: no tensor for its up"),
        (("wi", "wo"), {"form": ExpertForm(), "top_k": 4}, "routes to 4 experts per token, there"),
        (("up", "wo"), {"form": PLAIN, "interleaved": True}, r"L0/up .*expected gate and up in on"),
    ],
)
def test_tensors_that_contradict_the_form(
    names: tuple[str, ...], options: dict[str, Any], message: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ExpertStore(checkpoint, index_of(checkpoint, names), **{"top_k": 1, **options})


def test_a_layer_of_fewer_experts(checkpoint: Checkpoint) -> None:
    index = index_of(checkpoint, ("wi", "wo"))
    index["stack.1.moe"].pop()
    with pytest.raises(CheckpointError, match=r"stack\.1\.moe: expected 3 experts, found 2"):
        ExpertStore(checkpoint, index, form=ExpertForm(), top_k=1)


def test_an_index_of_no_experts(checkpoint: Checkpoint) -> None:
    for index in ({}, {"stack.0.moe": []}):
        with pytest.raises(CheckpointError, match="no experts"):
            ExpertStore(checkpoint, index, form=ExpertForm(), top_k=1)


def test_a_slice_outside_its_tensor(checkpoint: Checkpoint) -> None:
    index = index_of(checkpoint, ("wi", "wo"))
    good = index["stack.1.moe"][0]["down", "values"]
    for bad in (
        Slice(good.entry, good.entry.nbytes - good.nbytes + 1, good.shape),
        Slice(good.entry, -1, good.shape),
    ):
        index["stack.1.moe"][0]["down", "values"] = bad
        with pytest.raises(CheckpointError, match=r"L1/wo .*: bytes .* leave the tensor's 420"):
            ExpertStore(checkpoint, index, form=ExpertForm(), top_k=1)


def test_a_slice_that_begins_inside_an_element(checkpoint: Checkpoint) -> None:
    index = index_of(checkpoint, ("wi", "wo"))
    good = index["stack.0.moe"][0]["down", "values"]
    index["stack.0.moe"][0]["down", "values"] = Slice(good.entry, 2, good.shape)
    with pytest.raises(CheckpointError, match=r"L0/wo .*: byte 2 is inside an element"):
        ExpertStore(checkpoint, index, form=ExpertForm(), top_k=1)


def test_a_form_that_is_none(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="gate function"):
        ExpertStore(
            checkpoint, index_of(checkpoint, ("wi", "wo")), form=ExpertForm(Gate("x")), top_k=1
        )


def test_gpt_oss_experts_compute_what_transformers_computes(tmp_path: Path, seed: int) -> None:
    """Interleaved rows, biases and a clamped gate; stored by rows, as in its released files."""
    from transformers import AutoConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=24, intermediate_size=40, num_local_experts=5, swiglu_limit=1.0
    )
    module = GptOssExperts(config)
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.5)
    tensors = {
        name: (value if name.endswith("_bias") else value.transpose(1, 2)).detach().contiguous()
        for name, value in parameters.items()
    }
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    keys = {
        "gate_up_proj": ("gate_up", "values"),
        "gate_up_proj_bias": ("gate_up", "bias"),
        "down_proj": ("down", "values"),
        "down_proj_bias": ("down", "bias"),
    }
    slices = {key: split_fused(checkpoint.tensors[name], 5) for name, key in keys.items()}
    index = {"experts": [{key: found[e] for key, found in slices.items()} for e in range(5)]}
    store = ExpertStore(checkpoint, index, form=form_of(module), top_k=2, interleaved=True)
    cache = moeinf.ExpertCache(store, slots=2)
    hidden = torch.randn(9, 24)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.no_grad():
        expected = module(hidden, ids, weights)
    found = moeinf.fused_experts(hidden, ids, weights, cache, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

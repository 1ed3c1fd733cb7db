"""Names of experts' tensors are split into where, which expert, which matrix and which piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeinf.cache.cache import ExpertCache
from moeinf.checkpoint.families import parse
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError
from moeinf.kernels.forms import ExpertForm, Gate

HIDDEN, INTER, EXPERTS = 6, 10, 3


def place_of(name: str) -> tuple[Any, ...] | None:
    found = parse(name)
    if found is None:
        return None
    return found.module, found.model, found.layer, found.expert, found.matrix, found.piece


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "model.layers.3.mlp.experts.12.gate_proj.weight",
            ("model.layers.3.mlp.experts", "model", 3, 12, "gate", "values"),
        ),
        (
            "model.language_model.layers.0.mlp.experts.0.down_proj.weight",
            ("model.language_model.layers.0.mlp.experts", "model.language_model", 0, 0, "down",
             "values"),
        ),
        (
            "layers.9.ffn.experts.255.w3.weight",
            ("layers.9.ffn.experts", "", 9, 255, "up", "values"),
        ),
        (
            "model.layers.1.block_sparse_moe.experts.7.w1.weight",
            ("model.layers.1.block_sparse_moe.experts", "model", 1, 7, "gate", "values"),
        ),
        (
            "model.layers.1.mlp.experts.gate_up_proj",
            ("model.layers.1.mlp.experts", "model", 1, None, "gate_up", "values"),
        ),
        (
            "model.layers.1.mlp.experts.gate_up_proj_bias",
            ("model.layers.1.mlp.experts", "model", 1, None, "gate_up", "bias"),
        ),
        (
            "model.layers.1.mlp.experts.4.down_proj.bias",
            ("model.layers.1.mlp.experts", "model", 1, 4, "down", "bias"),
        ),
        (
            "model.llm.layers.2.mlp.experts.w13_weight",
            ("model.llm.layers.2.mlp.experts", "model.llm", 2, None, "gate_up", "values"),
        ),
        (
            "mtp.layers.0.mlp.experts.5.up_proj.weight",
            ("mtp.layers.0.mlp.experts", "mtp", 0, 5, "up", "values"),
        ),
        (
            "model.layers.1.mlp.experts.4.down_proj.weight_packed",
            ("model.layers.1.mlp.experts", "model", 1, 4, "down", None),
        ),
        ("model.vision_tower.blocks.3.mlp.experts.1.gate_proj.weight", None),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.3.mlp.gate.weight", None),
        ("model.layers.3.mlp.experts.12.gate_projector.weight", None),
        ("model.layers.x.mlp.experts.12.gate_proj.weight", None),
    ],
)  # fmt: skip
def test_the_parts_of_a_name(name: str, expected: tuple[Any, ...] | None) -> None:
    assert place_of(name) == expected


def write(
    folder: Path, tensors: dict[str, torch.Tensor], *, layers: int = 2, **config: Any
) -> Path:
    common = {"num_hidden_layers": layers, "num_experts": EXPERTS, "num_experts_per_tok": 2,
              "hidden_size": HIDDEN, "model_type": "qwen3_moe", "hidden_act": "silu"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**common, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def experts(stem: str, *, layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}
    return {
        f"{stem}layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight": torch.randn(
            size, generator=draw
        )
        for layer in range(layers)
        for expert in range(EXPERTS)
        for matrix, size in sizes.items()
    }


@pytest.mark.parametrize("other", ["mtp.", "talker.model.", "model.vision_tower."])
def test_experts_of_another_model_are_left_out(other: str, tmp_path: Path) -> None:
    text, others = experts("model."), experts(other, layers=1, seed=1)
    store = ExpertStore.open(write(tmp_path, {**others, **text}))
    assert store.tensor_names() == text.keys()
    down = text["model.layers.0.mlp.experts.1.down_proj.weight"]
    assert torch.equal(store.read(0, 1)["down"], down)


def test_experts_of_another_model_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no experts found"):
        ExpertStore.open(write(tmp_path, experts("mtp.")))


def test_experts_of_two_language_models(tmp_path: Path) -> None:
    tensors = {**experts("model."), **experts("model.language_model.", seed=1)}
    with pytest.raises(CheckpointError, match=r"two ways: '(.*)0\.mlp.* is .*, '.*0\.mlp"):
        ExpertStore.open(write(tmp_path, tensors))


def test_experts_named_in_two_ways(tmp_path: Path) -> None:
    tensors = experts("model.")
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(EXPERTS, 2 * INTER, HIDDEN)
    with pytest.raises(CheckpointError, match=r"two ways: .*per-expert.*fused gate_up_proj"):
        ExpertStore.open(write(tmp_path, tensors))


def test_two_modules_of_experts_in_one_layer(tmp_path: Path) -> None:
    tensors = experts("model.")
    tensors["model.layers.1.block_sparse_moe.experts.2.up_proj.weight"] = torch.zeros(INTER, HIDDEN)
    with pytest.raises(CheckpointError, match=r"experts of layer 1 are in model\.layers\.1"):
        ExpertStore.open(write(tmp_path, tensors))


def test_two_tensors_for_one_matrix(tmp_path: Path) -> None:
    tensors = fused("model.layers.0.mlp.experts", ("gate_up_proj", "down_proj"))
    tensors["model.layers.0.mlp.experts.down_proj.weight"] = torch.zeros(EXPERTS, HIDDEN, INTER)
    with pytest.raises(CheckpointError, match="are both the down values of experts in layer 0"):
        ExpertStore.open(write(tmp_path, tensors, layers=1))


def test_a_piece_that_no_weight_format_has(tmp_path: Path) -> None:
    tensors = experts("model.")
    tensors["model.layers.0.mlp.experts.0.up_proj.weight_scale_7"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_7 .*expected a name that en"):
        ExpertStore.open(write(tmp_path, tensors))


def test_layers_beyond_the_model_may_hold_anything(tmp_path: Path) -> None:
    tensors = experts("model.")
    tensors["model.layers.2.mlp.experts.0.up_proj.weight_scale_7"] = torch.ones(1)
    assert ExpertStore.open(write(tmp_path, tensors)).num_layers == 2


@pytest.mark.parametrize(
    "config, form",
    [
        ({}, ExpertForm()),
        ({"hidden_act": "gelu_new"}, ExpertForm(Gate(activation="gelu_tanh"))),
        ({"swiglu_limit": None}, ExpertForm()),
        ({"model_type": "deepseek_v4"}, ExpertForm(Gate("clamped_glu", limit=10.0))),
        ({"model_type": "hy_v4", "swiglu_limit": 3}, ExpertForm(Gate("clamped_glu", limit=3.0))),
        ({"model_type": "minimax_m3_vl_text", "swiglu_alpha": 1.5},
         ExpertForm(Gate("swiglu_oai", alpha=1.5, limit=7.0))),
        ({"model_type": "inkling2_text", "mlp_up_softcap": 9},
         ExpertForm(Gate("softcap_swiglu", alpha=4.0, limit=9.0))),
    ],
)  # fmt: skip
def test_what_experts_compute_by_the_configuration(
    config: dict[str, Any], form: ExpertForm, tmp_path: Path
) -> None:
    assert ExpertStore.open(write(tmp_path, experts("model."), **config)).form == form


@pytest.mark.parametrize(
    "config, message",
    [
        ({"swiglu_limit": 7.0}, r"config\.json: swiglu_limit is 7\.0, which no family 'qwen3_moe'"),
        ({"swiglu_limits": [None, 7.0]}, "swiglu_limits is"),
        ({"model_type": "hy_v4", "swiglu_limit": 0}, "swiglu_limit is 0, expected a number > 0"),
        ({"model_type": "hy_v4", "swiglu_limit": "7"}, "swiglu_limit is '7', expected a number"),
        ({"hidden_act": ["silu"]}, r"activation \['silu'\] is not one of"),
        ({"num_experts_per_tok": [2, 1]}, r"num_experts_per_tok is \[2, 1\], expected > 0"),
    ],
)
def test_a_configuration_that_says_something_unknown(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ExpertStore.open(write(tmp_path, experts("model."), **config))


def test_a_count_for_each_layer(tmp_path: Path) -> None:
    config = {"num_experts_per_tok": [2, 2], "num_experts": [EXPERTS, EXPERTS]}
    assert ExpertStore.open(write(tmp_path, experts("model."), **config)).top_k == 2


def gpt_oss(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Row-major tensors with biases, one expert after another, under per-expert names."""
    tensors = experts("model.")
    for name in list(tensors):
        rows = tensors[name].shape[0]
        tensors[name.replace(".weight", ".bias")] = torch.randn(rows)
    for name, value in changes.items():
        full = f"model.layers.1.mlp.experts.2.{name}"
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value
    return tensors


def test_biases_are_read_like_weights(tmp_path: Path) -> None:
    tensors = gpt_oss()
    store = ExpertStore.open(write(tmp_path, tensors, model_type="gpt_oss"))
    assert store.form == ExpertForm(Gate("swiglu_oai", alpha=1.702, limit=7.0), has_bias=True)
    for layer in range(2):
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.mlp.experts.{expert}."
            read = store.read(layer, expert)
            both = [tensors[f"{stem}{matrix}_proj.bias"] for matrix in ("gate", "up")]
            assert torch.equal(read["gate_up.bias"], torch.cat(both))
            assert torch.equal(read["down.bias"], tensors[f"{stem}down_proj.bias"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"up_proj.bias": None}, r"expert 2: no tensor for its up bias"),
        ({"up_proj.bias": torch.zeros(INTER + 1)}, r"2\.up_proj\.bias .*\[11\].*differs from"),
        ({"down_proj.bias": torch.zeros(HIDDEN).double()}, r"2\.down_proj\.bias .*F64.*differs"),
    ],
)
def test_biases_that_are_not_all_there(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ExpertStore.open(write(tmp_path, gpt_oss(**changes), model_type="gpt_oss"))


def test_biases_that_the_form_has_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"0\.down_proj\.bias .*its down bias, expected none"):
        ExpertStore.open(write(tmp_path, gpt_oss()))
    with pytest.raises(CheckpointError, match=r"expert 0: no tensor for its down bias and gate bi"):
        ExpertStore.open(write(tmp_path, experts("model."), model_type="gpt_oss"))


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(HIDDEN, dtype=torch.int8)])
def test_biases_of_a_wrong_kind(wrong: torch.Tensor, tmp_path: Path) -> None:
    tensors = {n: wrong.clone() if "down_proj.bias" in n else t for n, t in gpt_oss().items()}
    with pytest.raises(CheckpointError, match=r"down_proj\.bias .*expected"):
        ExpertStore.open(write(tmp_path, tensors, model_type="gpt_oss"))


def fused(stem: str, names: tuple[str, str], rows: int = 2 * INTER) -> dict[str, torch.Tensor]:
    gate_up, down = names
    return {
        f"{stem}.{gate_up}": torch.randn(EXPERTS, rows, HIDDEN),
        f"{stem}.{down}": torch.randn(EXPERTS, HIDDEN, rows // 2),
    }


def test_rows_of_gate_and_up_that_alternate(tmp_path: Path) -> None:
    """Inkling's files: the bytes stay as they are, and the matrices are views with a step."""
    stem = "model.llm.layers.0.mlp.experts"
    tensors = fused(stem, ("w13_weight", "w2_weight"))
    store = ExpertStore.open(write(tmp_path, tensors, layers=1))
    for expert in range(EXPERTS):
        slot = torch.zeros(1, store.slot_bytes, dtype=torch.uint8)
        for name, value in store.read(0, expert).items():
            store.layout[name].view(slot)[0] = value
        matrices = store.layout.matrices(slot)
        assert matrices.up is not None
        both = tensors[f"{stem}.w13_weight"][expert]
        assert torch.equal(matrices.gate.values[0], both[0::2])
        assert torch.equal(matrices.up.values[0], both[1::2])
        assert torch.equal(matrices.down.values[0], tensors[f"{stem}.w2_weight"][expert])


def test_an_odd_number_of_rows(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts"
    tensors = fused(stem, ("gate_up_proj", "down_proj"), rows=2 * INTER + 1)
    with pytest.raises(CheckpointError, match=r"\[21, 6\]\): expected an even number of rows"):
        ExpertStore.open(write(tmp_path, tensors, layers=1))


def test_fused_tensors_of_another_number_of_experts(tmp_path: Path) -> None:
    tensors = {
        name: tensor
        for layer in range(2)
        for name, tensor in fused(
            f"model.layers.{layer}.mlp.experts", ("gate_up_proj", "down_proj")
        ).items()
    }
    with pytest.raises(CheckpointError, match=r"\[3, .*config\.json says there are 4 experts"):
        ExpertStore.open(write(tmp_path, tensors, layers=2, num_experts=4))


@pytest.mark.parametrize("wide", [HIDDEN, INTER])
def test_transposed_tensors_are_turned(wide: int, tmp_path: Path) -> None:
    """Also where all sizes are equal, as in GPT-OSS: no shape would tell."""
    stem = "model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.gate_up_proj": torch.randn(EXPERTS, HIDDEN, 2 * wide),
        f"{stem}.gate_up_proj_bias": torch.randn(EXPERTS, 2 * wide),
        f"{stem}.down_proj": torch.randn(EXPERTS, wide, HIDDEN),
        f"{stem}.down_proj_bias": torch.randn(EXPERTS, HIDDEN),
    }
    store = ExpertStore.open(write(tmp_path, tensors, layers=1, model_type="gpt_oss"))
    cache = ExpertCache(store, slots=EXPERTS)
    with cache.acquire(0, range(EXPERTS)) as lease:
        matrices = store.layout.matrices(cache.pool())
        for expert, slot in enumerate(lease.slots):
            read = store.read(0, expert)
            gate_up = tensors[f"{stem}.gate_up_proj"][expert].T
            assert torch.equal(read["gate_up"], gate_up)
            assert torch.equal(read["down"], tensors[f"{stem}.down_proj"][expert].T)
            assert matrices.up is not None and matrices.up.bias is not None
            assert torch.equal(matrices.gate.values[slot], gate_up[0::2])
            assert torch.equal(matrices.up.values[slot], gate_up[1::2])
            assert torch.equal(matrices.down.values[slot], read["down"])
            bias = tensors[f"{stem}.gate_up_proj_bias"][expert]
            assert torch.equal(matrices.up.bias[slot], bias[1::2])

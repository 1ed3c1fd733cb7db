"""What a model needs from the files: every tensor is accounted for, by transformers' own names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, OWN_GATES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import moeinf
from moeinf import CheckpointError
from moeinf.checkpoint.folder import Checkpoint
from moeinf.integrations.transformers.models import model_of
from moeinf.integrations.transformers.plan import Plan, make_plan

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(3, 21).view(2, 9)


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    tensors = {name: t.clone().contiguous() for name, t in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def plan_of(folder: Path) -> Plan:
    checkpoint = Checkpoint.open(folder)
    return make_plan(*model_of(checkpoint), checkpoint)


def reference_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def served_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = moeinf.load(folder, device="cpu", slots=3)(IDS).logits
    return logits


def assert_served_right(folder: Path) -> None:
    torch.testing.assert_close(
        served_logits(folder), reference_logits(folder), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *OWN_GATES])
def test_the_table_of_families_agrees_with_transformers(
    family: str, original_names: bool, tmp_path: Path
) -> None:
    """Without transformers a store is opened by the table: the same bytes, the same form."""
    write_checkpoint(tmp_path, family, original_names=original_names)
    (derived,) = plan_of(tmp_path).stores
    opened = moeinf.ExpertStore.open(tmp_path)
    assert (derived.form, derived.layout) == (opened.form, opened.layout)
    assert (derived.num_layers, derived.num_experts) == (opened.num_layers, opened.num_experts)
    assert derived.top_k == opened.top_k
    for layer in range(opened.num_layers):
        for expert in range(opened.num_experts):
            assert derived.extents(layer, expert) == opened.extents(layer, expert)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "model.layers.1.self_attn.q_proj.weight"),
        ("qwen3_moe", "model.layers.2.mlp.gate.weight"),
        ("qwen3_moe", "lm_head.weight"),
        ("qwen3_moe", "model.norm.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("deepseek_v3", "model.layers.0.mlp.up_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_missing_tensor_is_named(family: str, name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)

    def drop(tensors: Tensors) -> Tensors:
        del tensors[name]
        return tensors

    edit(tmp_path, drop)
    with pytest.raises(CheckpointError, match=f"no tensor for {name}"):
        moeinf.load(tmp_path)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model.layers.1.mlp.experts.4.up_proj.weight", "up_proj.*no tensor of expert 4"),
        ("model.layers.1.mlp.experts.0.down_proj.weight", "down_proj.*no tensor of expert 0"),
        ("model.layers.2.mlp.experts.", "no tensor for model.layers.2.mlp.experts.down_proj and 1"),
        (".up_proj.weight", "no tensor for its .*up_proj"),
    ],
)
def test_a_missing_tensor_of_an_expert_is_named(drop: str, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if drop not in n})
    with pytest.raises(CheckpointError, match=message):
        moeinf.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"],
)
def test_a_tensor_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, name: torch.zeros(7, 40)})
    with pytest.raises(CheckpointError, match=rf"{name}.*7, 40\]"):
        moeinf.load(tmp_path)


def test_more_experts_than_the_model_has(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    extra = {f"model.layers.1.mlp.experts.6.{m}_proj.weight": torch.zeros(s) for m, s in
             (("gate", (24, 40)), ("up", (24, 40)), ("down", (40, 24)))}  # fmt: skip
    edit(tmp_path, lambda tensors: {**tensors, **extra})
    with pytest.raises(CheckpointError, match="there are 6 experts, found a tensor of expert 6"):
        moeinf.load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model."])
def test_another_prefix_is_resolved_as_transformers_does_or_refused(
    prefix: str, tmp_path: Path
) -> None:
    """transformers adds or removes its own prefix; what it would fill at random is refused."""
    write_checkpoint(tmp_path)
    edit(
        tmp_path,
        lambda tensors: {prefix + n.removeprefix("model."): t for n, t in tensors.items()},
    )
    if not prefix:
        assert_served_right(tmp_path)
        return
    with pytest.raises(CheckpointError, match=r"no tensor for .* and 5 more, which the model"):
        moeinf.load(tmp_path)


@pytest.mark.parametrize("prefix", ["mtp.", "draft.", "talker.model.", "model.visual."])
@pytest.mark.parametrize("original_names", [True, False])
def test_experts_of_no_module_of_the_model_are_left_out(
    prefix: str, original_names: bool, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, original_names=original_names)
    edit(
        tmp_path,
        lambda tensors: (
            tensors
            | {
                n.replace("model.", prefix, 1): t + 1
                for n, t in tensors.items()
                if "layers.0.mlp.experts" in n
            }
        ),
    )
    with pytest.warns(UserWarning, match=f"has no use for {prefix}"):
        assert_served_right(tmp_path)


def test_left_over_tensors_are_named_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, "model.layers.1.extra.weight": torch.zeros(3)})
    with pytest.warns(UserWarning) as caught:
        moeinf.load(tmp_path)
    said = [str(one.message) for one in caught if "model.layers.1.extra.weight" in str(one.message)]
    assert len(said) == 1


def test_what_transformers_declares_ignorable_is_not_named(tmp_path: Path) -> None:
    """deepseek_v3 files carry a block that predicts several tokens; its class says so."""
    write_checkpoint(tmp_path, "deepseek_v3")
    edit(tmp_path, lambda tensors: {**tensors, "model.layers.61.eh_proj.weight": torch.zeros(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moeinf.load(tmp_path)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_scales_of_a_dense_weight_are_refused(suffix: str, tmp_path: Path) -> None:
    """Left out, they would leave the weight wrong by a factor."""
    write_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda tensors: {**tensors, name + suffix: torch.full((1, 1), 1 / 64)})
    with pytest.raises(CheckpointError, match=f"{name}{suffix}.*not supported"):
        moeinf.load(tmp_path)


def test_integers_in_place_of_floats_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda tensors: {**tensors, name: tensors[name].long()})
    with pytest.raises(CheckpointError, match=rf"{name} .*I64.*expected floating-point"):
        moeinf.load(tmp_path)


def test_float64_is_loaded_as_transformers_does_and_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda tensors: {**tensors, name: tensors[name].double()})
    with pytest.warns(UserWarning, match=rf"{name} .*F64.*loses precision"):
        assert_served_right(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_shard_size="40KB")
    other = write_checkpoint(tmp_path / "other", seed=5)
    (tmp_path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert_served_right(tmp_path)
    torch.testing.assert_close(served_logits(tmp_path), served_logits(other), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_a_count_that_the_configuration_leaves_to_its_class(key: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral", num_local_experts=8)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert_served_right(tmp_path)


def test_a_count_for_each_layer(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, "hunyuan_v1_moe", num_experts=6, moe_topk=[3, 3, 3], intermediate_size=24,
        moe_intermediate_size=[24, 24, 24], head_dim=10, pad_token_id=0,
    )  # fmt: skip
    assert_served_right(tmp_path)


def test_more_experts_per_token_than_there_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 7}))
    with pytest.raises(CheckpointError, match="routes to 7 experts per token, there are 6"):
        moeinf.load(tmp_path)


def test_a_composite_configuration(tmp_path: Path) -> None:
    """The causal class takes the text part, as AutoModelForCausalLM does."""
    config = AutoConfig.for_model(
        "qwen3_5_moe",
        text_config={
            "vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert_served_right(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["NoSuchModel"]])
def test_architectures_that_fit_no_class(architectures: list[str] | None, tmp_path: Path) -> None:
    """The class is then the one that transformers has for the model type."""
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": architectures}))
    assert type(moeinf.load(tmp_path)).__name__ == "Qwen3MoeForCausalLM"


def test_the_class_that_architectures_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Qwen3MoeModel"]}))
    with pytest.warns(UserWarning, match="no use for lm_head.weight"):
        assert type(moeinf.load(tmp_path)).__name__ == "Qwen3MoeModel"


@pytest.mark.parametrize("drop", [True, False])
def test_tied_embeddings_with_and_without_a_head_in_the_files(drop: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)

    def change(tensors: Tensors) -> Tensors:
        tensors.pop("lm_head.weight", None)
        return (
            tensors if drop else tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        )

    edit(tmp_path, change)
    assert_served_right(tmp_path)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=40, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(moeinf.UnsupportedError, match="LlamaForCausalLM has no experts modules"):
        moeinf.load(tmp_path)

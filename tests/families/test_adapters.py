"""Families outside transformers' experts interface, served by an adapter: equal to transformers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.nllb_moe import modeling_nllb_moe as nllb

import moeinf
from moeinf.integrations.transformers.conversation import Conversation
from moeinf.integrations.transformers.generation import start_recording
from moeinf.integrations.transformers.models import model_class

SIZES: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        "d_model": 24, "d_kv": 8, "d_ff": 20, "num_heads": 3, "num_layers": 4,
        "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
        "num_experts": 11, "expert_capacity": 2, "decoder_start_token_id": 0,
    },
    "nllb-moe": {
        "d_model": 24, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 20, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
        "encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_experts": 11, "expert_capacity": 3,
        "max_position_embeddings": 64, "moe_token_dropout": 0.2, "decoder_start_token_id": 2,
        "moe_eval_capacity_token_fraction": 0.3,
    },
    "llama4_text": {
        "hidden_size": 32, "intermediate_size": 20, "intermediate_size_mlp": 28, "head_dim": 8,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    },
    "jetmoe": {
        "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 3, "kv_channels": 8,
        "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2,
    },
    "longcat_flash": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4,
        "ffn_hidden_size": 28, "expert_ffn_hidden_size": 20, "n_routed_experts": 6,
        "zero_expert_num": 3, "moe_topk": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 3,
                       "hidden_size": 32, "ffn_act_fn": {"name": "silu"}},
    },
    "step3p7": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                        "sliding_window": 5, "swiglu_limits": [0.0, 0.5, 0.0, 0.0]},
    },
}  # fmt: skip
COMMON = {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def published_nllb(self: Any, hidden: Any, _: Any, weights: Any) -> torch.Tensor:
    """What experts of the published NLLB-MoE give, expert by expert.

    transformers 5 runs experts 0 and 1 alone."""
    out = torch.zeros_like(hidden)
    for number in range(self.num_experts):
        expert = self[f"expert_{number}"]
        share = weights[:, number, None] * (1 - self.moe_token_dropout)
        out += torch.where(share != 0, share * expert(hidden), 0)
    return out


def as_published(path: Path, experts: int) -> None:
    """transformers writes a gate and an up for experts that have no weights."""
    number = re.compile(r"\.experts\.(\d+)\.")
    kept = {}
    for name, tensor in load_file(path).items():
        found = number.search(name)
        if found is None or int(found[1]) < experts:
            kept[name] = tensor
    save_file(kept, path, metadata={"format": "pt"})


def logits_of(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


@pytest.fixture(scope="module", params=[name for name in SIZES if name in CONFIG_MAPPING])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A random model of a family, and the folder where it is saved."""
    family = request.param
    if family == "dbrx" and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 makes its router of the size of the experts, and fails")
    sizes = {**COMMON, **SIZES[family]}
    if "text_config" in sizes:
        own = tiny(CONFIG_MAPPING[family])
        sizes = {**own, **sizes, "text_config": own["text_config"] | sizes["text_config"]}
    config = AutoConfig.for_model(family, **sizes)
    base, config = model_class(config, SimpleNamespace(config_file="config.json"))
    torch.manual_seed(0)
    reference: Any = base(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp(family)
    reference.save_pretrained(folder)
    if family == "longcat_flash":
        as_published(folder / "model.safetensors", config.n_routed_experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nllb.NllbMoeExperts, "forward", published_nllb)
        yield SimpleNamespace(family=family, reference=reference, folder=folder)


def test_logits_and_tokens_are_those_of_transformers(made: Any) -> None:
    reference, expected = made.reference, logits_of(made.reference)
    model = moeinf.load(made.folder, device="cpu", dtype=torch.float32)
    found = logits_of(model)
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * scale
    small = moeinf.load(made.folder, device="cpu", slots=2)
    assert torch.equal(logits_of(small), found)
    if reference.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="expected a decoder alone for a conversation"):
            Conversation(model, None)
        with model.moeinf.cache.record() as recorder:
            logits_of(model)
        with pytest.raises(ValueError, match="an encoder and its decoder run apart"):
            recorder.trace()
        with pytest.raises(moeinf.UnsupportedError, match="its encoder and its decoder run apart"):
            start_recording(model, router=False)
    options: Any = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), reference.generate(IDS, **options))
    without = copy.deepcopy(reference)
    for name, parameter in without.named_parameters():
        if "experts." in name or "put_linear" in name:
            parameter.data.zero_()
    assert (logits_of(without) - expected).abs().max() > 1e-3 * scale


def test_it_is_saved_whole(made: Any, tmp_path: Path) -> None:
    model = moeinf.load(made.folder, device="cpu", slots=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(moeinf.load(tmp_path, device="cpu")), logits_of(model))
    if made.family != "longcat_flash":  # transformers cannot read what is published
        saved = type(made.reference).from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(saved), logits_of(made.reference))


def test_gradients_of_all_but_the_experts_are_those_of_transformers(made: Any) -> None:
    model = moeinf.load(made.folder, device="cpu", dtype=torch.float32)
    found, expected = gradients_of(model), gradients_of(made.reference)
    served = [name for name in expected if "experts." in name or "put_linear" in name]
    assert {*expected} - {*served} <= {*found}
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in expected.keys() & found.keys():
        assert (found[name] - expected[name]).abs().max() <= 1e-4 * size, name


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    model.zero_grad()
    model(input_ids=IDS, **more).logits.pow(2).mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_training_with_dropout_inside_experts_is_refused(made: Any) -> None:
    model = moeinf.load(made.folder, device="cpu").train()
    if made.family not in ("switch_transformers", "nllb-moe"):
        assert gradients_of(model)
        return
    with pytest.raises(moeinf.UnsupportedError, match="dropout inside experts is 0"):
        gradients_of(model)


def test_its_router_runs_ahead_or_that_is_refused(made: Any) -> None:
    model = moeinf.load(made.folder, device="cpu")
    if made.family == "step3p7":
        with model.moeinf.cache.record(router=True) as recorder:
            logits_of(model)
        assert recorder.trace().router is not None
        ahead = moeinf.load(made.folder, device="cpu", slots=4, prefetch="gate")
        assert torch.equal(logits_of(ahead), logits_of(model))
        return
    for asked in (
        lambda: moeinf.load(made.folder, prefetch="gate"),
        lambda: model.moeinf.cache.record(router=True),
    ):
        with pytest.raises(moeinf.UnsupportedError, match="router cannot be called alone, which"):
            asked()


def test_a_family_that_is_not_served(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 1}
    base, config = model_class(
        AutoConfig.for_model("doge", is_moe=True, num_experts=16, **COMMON, **sizes),
        SimpleNamespace(config_file="config.json"),
    )
    base(config).save_pretrained(tmp_path)
    with pytest.raises(moeinf.UnsupportedError, match="'doge' is not served: each of its experts"):
        moeinf.load(tmp_path)

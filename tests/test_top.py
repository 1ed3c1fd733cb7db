"""`moeinf top`: a running process says what its caches did, to its own user, while it runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import moeinf
from moeinf.cache import live
from moeinf.cli.top import cells
from moeinf.pocket import POCKET

PROGRAM = """
import sys, torch, moeinf
cache = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[1]), slots=8, policy="lru")
ids = torch.tensor([[0, 1], [2, 1]])
moeinf.fused_experts(torch.ones(2, 160), ids, torch.ones(2, 2), cache, 3)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def program() -> Iterator[subprocess.Popen[str]]:
    """A process that has used three experts of layer 3 and lives."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(POCKET)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeinf.cli", "top", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_a_running_program_is_seen_and_an_ended_one_is_not() -> None:
    with program() as process:
        assert process.pid in live.running()
        shown = top("--once", str(process.pid))
        assert shown.returncode == 0, shown.stderr
        assert f"{POCKET}  8 of 256 experts" in shown.stdout
        rows = {line.split()[1]: line.split() for line in shown.stdout.splitlines() if "│" in line}
        assert rows["3"][3] == rows["all"][3] == "3"
        assert rows["2"][3] == "0"
        (report,) = json.loads(top("--json", str(process.pid)).stdout)
        (cache,) = report["caches"]
        assert (cache["accesses"], cache["misses"], cache["slots"]) == (3, 3, 8)
        assert [layer["accesses"] for layer in cache["layers"]] == [0, 0, 0, 3, 0, 0, 0, 0]
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        process.wait()
        assert pid not in live.running(), "a socket in the abstract namespace leaves nothing"
        refused = top("--once", str(pid))
        assert refused.returncode != 0
        assert f"process {pid} does not answer" in refused.stderr


def test_the_answer_is_that_of_stats() -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=8)
    moeinf.fused_experts(torch.ones(1, 160), torch.tensor([[3, 9]]), torch.ones(1, 2), cache, 0)
    answers = {one["name"]: one for one in live.ask(os.getpid())["caches"]}
    found = answers[cache.name]
    assert {name: found[name] for name in cache.stats()} == cache.stats()
    name = cache.name
    del cache
    assert name not in [one["name"] for one in live.ask(os.getpid())["caches"]]


def test_another_user_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=8)
    monkeypatch.setattr(live, "_user_of", lambda connection: os.getuid() + 1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(f"\0moeinf-{os.getuid()}-{os.getpid()}")
        assert connection.recv(100) == b""
    with pytest.raises(PermissionError, match="another user's"):
        live.ask(os.getpid())
    monkeypatch.undo()
    assert cache.name in [one["name"] for one in live.ask(os.getpid())["caches"]]


def test_after_a_fork_both_answer_for_themselves() -> None:
    code = (
        "import os, sys, moeinf\nfrom moeinf.cache import live\n"
        "store = moeinf.ExpertStore.open(sys.argv[1])\n"
        "first = moeinf.ExpertCache(store, slots=2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert os.getpid() not in live.running()\n"
        "    mine = moeinf.ExpertCache(store, slots=3)\n"
        "    names = [one['name'] for one in live.ask(os.getpid())['caches']]\n"
        "    os._exit(0 if mine.name in names else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert len(live.ask(os.getpid())['caches']) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code, str(POCKET)], check=True, timeout=100)


def test_who_asks_nothing_running_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "running", lambda: [])
    from moeinf.cli.top import command

    with pytest.raises(ValueError, match="no process of yours"):
        command(pids=None, interval=1.0, once=True, json=False)


def test_rates_are_those_since_the_look_before() -> None:
    names = ("accesses", "hits", "misses", "evictions", "demand_bytes", "prefetch_bytes")
    old = dict.fromkeys(names, 100) | {"stall_seconds": 1.0}
    old |= {"prefetch_useful_bytes": 0, "prefetch_wasted_bytes": 0}
    new = old | {"accesses": 140, "hits": 130, "demand_bytes": 100 + 4096, "stall_seconds": 1.5}
    assert cells(new, old, 2.0) == ["20", "75.0%", "2.00 KiB", "0 B", "25%"]
    assert cells(new, None, None)[0] == "140"
    again = dict.fromkeys(old, 0) | {"accesses": 10}  # set to zero in between
    assert cells(again, old, 1.0)[0] == "10"


def test_a_machine_without_such_sockets_runs_as_it_did() -> None:
    code = (
        "import socket, sys, moeinf\n"
        "def refuse(*_): raise OSError('refused')\n"
        "class Refusing(socket.socket): bind = refuse\n"
        "socket.socket = Refusing\n"
        "moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[1]), slots=2)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(POCKET)], check=True, timeout=100)

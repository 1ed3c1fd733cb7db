"""A server under load: many streams at once for minutes, then thousands of broken requests.

    python -m benchmarks.server_load --json benchmarks/results/server.json

Starts `moeinf serve` on the built-in model with a quarter of its experts in memory. Three phases:

    alone    prompts one after another, greedy: their text must be that of an offline run
    streams  --clients that stream for --seconds; a tenth of the requests is left in the middle
    fuzz     --fuzz requests drawn at random, while one client streams and must notice nothing

The limit is the offline run in this process: the same prompts one after another. Memory is the
resident set of the server after a tenth of the streams' time (it has warmed up) against its end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

import moeinf
from benchmarks.common import ROOT, print_table, write_json
from moeinf.integrations.transformers.generation import read_tokenizer
from moeinf.pocket import POCKET

sys.path.insert(0, str(ROOT / "tests" / "server"))
from fuzzing import fuzzed_request
from running import read_reply

PROMPTS = ["import os\n", "def read(x):\n", "class A:\n", "for i in range(", "x = [", "with open("]
TOKENS = 48
CLEAR = {200, 400, 401, 404, 405, 408, 413, 415, 429}


class Server:
    """The process, its address and its memory."""

    def __init__(self, memory: str, parallel: int):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "moeinf.cli", "serve", "--json", "--port", "0"),
                *("--memory", memory, "--parallel", str(parallel)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = json.loads(self.process.stdout.readline())["address"]
        self.port = int(self.address.rpartition(":")[2])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300
        )

    def resident(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


def stream(client: openai.OpenAI, prompt: str, leave_after: int | None = None) -> tuple[str, float]:
    """The text of a greedy answer and the seconds to its first piece."""
    start, first, text = time.perf_counter(), 0.0, ""
    chunks = client.completions.create(
        model="pocket", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
    )
    for number, chunk in enumerate(chunks):
        first = first or time.perf_counter() - start
        text += chunk.choices[0].text
        if number == leave_after:
            chunks.close()
            break
    return text, first


def offline(seconds: float) -> tuple[list[str], float]:
    """Texts of the prompts, and tokens/s of an offline run of so many seconds."""
    model: Any = moeinf.load(POCKET, memory="25%")
    tokenizer: Any = read_tokenizer(POCKET)

    def write(prompt: str) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            options = {"do_sample": False, "temperature": None, "top_p": None}
            output = model.generate(**inputs, max_new_tokens=TOKENS, **options)[0]
        return output[inputs["input_ids"].shape[1] :].tolist()

    texts = [tokenizer.decode(write(prompt), skip_special_tokens=True) for prompt in PROMPTS]
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        count += len(write(PROMPTS[count % len(PROMPTS)]))
    return texts, count / spent


def load(server: Server, wanted: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """Streams from all clients until the time is over."""
    end = time.monotonic() + seconds
    errors: list[str] = []
    firsts: list[float] = []
    counts: Counter[str] = Counter()

    def run(number: int) -> None:
        draw, client = random.Random(number), server.client()
        while time.monotonic() < end:
            which = draw.randrange(len(PROMPTS))
            leave = draw.randrange(1, 20) if draw.random() < 0.1 else None
            try:
                text, first = stream(client, PROMPTS[which], leave)
            except openai.OpenAIError as error:
                errors.append(repr(error))
                continue
            firsts.append(first)
            counts["left" if leave else "finished"] += 1
            if leave is None and text != wanted[which]:
                errors.append(f"another text for {PROMPTS[which]!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    before = metric(server, "moeinf_generated_tokens_total")
    start = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)
    memory = [server.resident()]
    while time.monotonic() < end:
        time.sleep(min(5.0, seconds / 20))
        memory.append(server.resident())
    for thread in threads:
        thread.join()
    tokens = metric(server, "moeinf_generated_tokens_total") - before
    return {
        "clients": clients,
        "seconds": seconds,
        "finished": counts["finished"],
        "left_in_the_middle": counts["left"],
        "errors": errors[:20],
        "error_count": len(errors),
        "tokens_per_second": tokens / (time.monotonic() - start),
        "first_token_seconds_median": sorted(firsts)[len(firsts) // 2],
        "first_token_seconds_worst": max(firsts),
        "memory_after_a_tenth": memory[0],
        "memory_at_the_end": memory[-1],
        "memory_most": max(memory),
        "memory_change": memory[-1] / memory[0] - 1,
    }


def fuzz(server: Server, wanted: list[str], count: int, seed: int) -> dict[str, Any]:
    """Broken requests from sixteen connections, while one client streams."""
    statuses: Counter[str] = Counter()
    unclear: list[str] = []
    over = threading.Event()
    others: Counter[str] = Counter()

    def watch() -> None:
        client = server.client()
        while not over.is_set():
            try:
                good = stream(client, PROMPTS[0])[0] == wanted[0]
            except openai.OpenAIError:
                good = False
            others["right" if good else "wrong"] += 1

    def ask(number: int) -> None:
        draw = random.Random(seed + number)
        data = fuzzed_request(draw, "pocket")
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(data)
                if draw.random() < 0.05:  # it leaves at once
                    statuses["left"] += 1
                    return
                reply = read_reply(connection)
        except OSError as error:
            unclear.append(f"seed {seed + number}: {error!r}")
            return
        status = reply.status if reply else 0
        statuses[str(status)] += 1
        if status not in CLEAR:
            unclear.append(f"seed {seed + number}: {status}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(ask, range(count)):
            pass
    over.set()
    watcher.join()
    return {
        "requests": count,
        "seed": seed,
        "seconds": time.monotonic() - start,
        "statuses": dict(sorted(statuses.items())),
        "unclear": unclear[:20],
        "unclear_count": len(unclear),
        "streams_meanwhile": dict(others),
        "memory_at_the_end": server.resident(),
    }


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.M)
    assert found is not None
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"seed: {options.seed}")
    wanted, rate = offline(min(20.0, options.seconds / 5))
    server = Server("25%", options.parallel)
    try:
        client = server.client()
        alone = [stream(client, prompt)[0] for prompt in PROMPTS]
        start = time.monotonic()
        before = metric(server, "moeinf_generated_tokens_total")
        for number in range(4 * len(PROMPTS)):
            stream(client, PROMPTS[number % len(PROMPTS)])
        tokens = metric(server, "moeinf_generated_tokens_total") - before
        one_client = tokens / (time.monotonic() - start)
        loaded = load(server, wanted, options.clients, options.seconds)
        fuzzed = fuzz(server, wanted, options.fuzz, options.seed)
    finally:
        server.process.terminate()
        ended = server.process.wait(60)
    results: dict[str, Any] = {
        "alone_identical_to_offline": alone == wanted,
        "offline_tokens_per_second": rate,
        "one_client_tokens_per_second": one_client,
        "streams": loaded,
        "fuzz": fuzzed,
        "exit_status": ended,
    }
    ratio = loaded["tokens_per_second"] / rate
    print_table(
        [
            {"what": "offline, one prompt after another", "rate": rate, "ratio": 1.0},
            {"what": "server, one client", "rate": one_client, "ratio": one_client / rate},
            {
                "what": f"server, {options.clients} clients",
                "rate": loaded["tokens_per_second"],
                "ratio": ratio,
            },
        ],
        {"what": ("", ""), "rate": ("tokens/s", ".1f"), "ratio": ("of offline", ".2f")},
    )
    print(json.dumps(results, indent=2))
    if options.json:
        write_json(options.json, "server_load", **results)
    passed = (
        results["alone_identical_to_offline"]
        and not loaded["error_count"]
        and abs(loaded["memory_change"]) <= 0.02
        and not fuzzed["unclear_count"]
        and not fuzzed["streams_meanwhile"].get("wrong")
        and ended == 0
    )
    sys.exit(0 if passed else "the server did not keep its promises: see above")


if __name__ == "__main__":
    main()

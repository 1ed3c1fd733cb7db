"""moeinf, llama.cpp, transformers and accelerate's disk offload on the same weights and tokens.

    python -m benchmarks.peers --llama-python ENV/bin/python --json benchmarks/results/peers.json

Weights: random, with the geometry of Qwen3-30B-A3B and a few of its 48 layers; `--small` takes the
built-in model and no limit. llama.cpp gets them as GGUF (gguf_export.py). It is `llama-cpp-python`
of PyPI, in an environment of its own, in which llama_child.py runs.

Tokens: drawn once with Zipf's law, so that experts repeat as in text; every system gets the same
ones. A run is a process: it loads the model, reads a prompt (the time to the first token counts
loading too), reads another one (prefill), then decodes one token at a time. A round runs every
system in turn. The table has each system's fastest prefill and the least of its means of decoding.

Memory: `100%` has no limit. A share stands for a cgroup that holds that share of the experts, all
other weights, a tenth of both, and the runtime's own libraries and buffers (RUNTIME). The page
cache counts in it. llama.cpp maps the file, so the read-ahead of the disk decides what it reads.
Where it can be set, a run is repeated at each `--read-ahead`. "At its best" is 4 and 8 bits: our
packs and llama.cpp's own files, opened by both, under a limit that holds the same share of *those*
experts; moeinf keeps the other weights of such a file packed as well. "In the bytes of" another
format: the memory for experts is that format's, so more of them fit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import print_table, write_json
from benchmarks.end_to_end import memory_cgroup
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf.cpus import usable_cpus
from moeinf.pocket import POCKET

RUNTIME = {"moeinf": 1200 << 20, "llama.cpp": 256 << 20}  # beside the weights; of torch: 1200 MiB
FTYPES = {"Q4_K_M": 15, "Q8_0": 7}
PACKS = ("int4", "mxfp4", "fp8", "bf16-palette")
BOTH = "int4+int8"  # experts, and linear layers outside them
SHARES = (50.0, 25.0, 12.5)
OFFLOAD_TOKENS = 3


@dataclass(frozen=True)
class Run:
    system: str  # "moeinf", "llama.cpp", "transformers" or "accelerate"
    format: str
    share: float  # of the experts that memory holds, in percent
    read_ahead: int | None = None  # KiB; None: the machine's own
    of: str | None = None  # the format whose experts the share counts; None: this one

    @property
    def name(self) -> str:
        ahead = "" if self.read_ahead is None else f", read-ahead {self.read_ahead} KiB"
        of = "" if self.of is None else f" of {self.of}'s bytes"
        return f"{self.system}, {self.format}, {self.share:g}%{of}{ahead}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="4 GB per layer")
    parser.add_argument("--llama-python", type=Path, help="of an environment with llama-cpp-python")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=Geometry.vocabulary)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--read-ahead", type=int, nargs="*", default=[128, 512], help="KiB")
    parser.add_argument("--small", action="store_true", help="the built-in model, in a minute")
    parser.add_argument("--only", nargs="*", default=[""], help="runs whose name contains one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(json.loads(arguments.child.read_text()))))
        return
    if arguments.small:
        folder, arguments.prompt, arguments.tokens, arguments.rounds = Path(POCKET), 64, 8, 1
    else:
        geometry = Geometry(layers=arguments.layers, vocabulary=arguments.vocabulary)
        folder = arguments.dir / f"qwen3-30b-a3b-{arguments.layers}-layers-{arguments.vocabulary}"
        write_random_checkpoint(folder, geometry)
    models = Models(folder, arguments.dir, arguments.llama_python)
    wanted = all_runs(arguments, models.disk)
    runs = [run for run in wanted if any(part in run.name for part in arguments.only)]
    measured: dict[Run, list[dict[str, Any]]] = {run: [] for run in runs}
    job = tokens_of(folder, arguments)
    for number in range(arguments.rounds):
        for run in runs:
            if number and run.system == "accelerate":
                continue  # minutes, and far from the others
            measured[run].append(measure(run, models, job))
            print(f"round {number + 1}: {run.name}", file=sys.stderr)
    rows = [row_of(run, found) for run, found in measured.items()]
    print_table(
        rows,
        {
            "name": ("system, format, experts in memory", ""),
            "tokens_per_second": ("tokens/s", ".2f"),
            "prefill_seconds": ("prefill s", ".2f"),
            "first_token_seconds": ("first token s", ".2f"),
            "peak_gb": ("peak GB", ".2f"),
        },
    )
    if arguments.json:
        write_json(
            arguments.json,
            "peers",
            small=arguments.small,
            layers=arguments.layers,
            vocabulary=job["vocabulary"],
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            rounds=arguments.rounds,
            threads=job["threads"],
            read_ahead_kib=models.disk.own,
            rows=rows,
        )


def all_runs(arguments: argparse.Namespace, disk: ReadAhead) -> Iterator[Run]:
    has_llama = arguments.llama_python is not None
    yield Run("moeinf", "bf16", 100)
    if has_llama:
        yield Run("llama.cpp", "bf16", 100)
    yield Run("transformers", "bf16", 100)
    if arguments.small:
        yield Run("moeinf", "bf16", 25)
        yield Run("moeinf", "bf16-palette", 25)
        return
    for share in SHARES:
        yield Run("moeinf", "bf16", share)
        if has_llama:
            for ahead in [*disk.settable(arguments.read_ahead), None]:
                if ahead is None or share == 25:
                    yield Run("llama.cpp", "bf16", share, ahead)
    yield Run("accelerate", "bf16", 25)
    for share in (100, 25):
        for format in (*PACKS, BOTH):
            yield Run("moeinf", format, share)
        for format in FTYPES if has_llama else ():
            yield Run("moeinf", format, share)  # the same file
            yield Run("llama.cpp", format, share)
    for format in PACKS:
        yield Run("moeinf", format, SHARES[-1], of="bf16")


def tokens_of(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)

    def draw(count: int) -> list[int]:
        drawn: list[int] = torch.multinomial(weights, count, True, generator=generator).tolist()
        return drawn

    return {
        "first": draw(arguments.prompt),
        "second": draw(arguments.prompt),
        "warm": draw(8),
        "tokens": draw(arguments.tokens),
        "threads": usable_cpus(),
        "vocabulary": vocabulary,
    }


class ReadAhead:
    """Of the disk that holds a folder. Set for the time of a run, then as it was."""

    def __init__(self, folder: Path):
        device = folder.stat().st_dev
        base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        files = (base / "queue/read_ahead_kb", base / "../queue/read_ahead_kb")
        self.file = next((file for file in files if file.exists()), None)
        self.own = int(self.file.read_text()) if self.file else None

    def settable(self, wanted: list[int]) -> list[int]:
        if self.file is not None and os.access(self.file, os.W_OK):
            return wanted
        print("the read-ahead of this disk cannot be set: its own alone", file=sys.stderr)
        return []

    @contextmanager
    def set(self, kib: int | None) -> Iterator[None]:
        if kib is None or self.file is None:
            yield
            return
        self.file.write_text(str(kib))
        try:
            yield
        finally:
            self.file.write_text(str(self.own))


class Models:
    """The weights in each format, written when first asked for."""

    def __init__(self, folder: Path, directory: Path, llama_python: Path | None):
        directory.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.directory = directory
        self.llama_python = llama_python
        self.disk = ReadAhead(directory)

    def of(self, run: Run) -> Path:
        name = f"{self.folder.name}-{run.format}"
        if run.system == "llama.cpp" or run.format in FTYPES:
            path = self.directory / f"{name}.gguf"
            if run.format == "bf16":
                from benchmarks.gguf_export import export

                export(self.folder, path)
            elif not path.exists():
                source = self.of(Run("llama.cpp", "bf16", 100))
                self.llama(
                    {
                        "model": str(source),
                        "quantise": f"{path}.part",
                        "ftype": FTYPES[run.format],
                        "threads": usable_cpus(),
                    }
                )
                Path(f"{path}.part").rename(path)
            return path
        if run.format == "bf16":
            return self.folder
        from moeinf.packing.pack import pack

        path = self.directory / name
        if not (path / "config.json").exists():  # which a pack writes last
            experts, _, dense = run.format.partition("+")
            pack(self.folder, path, format=experts, dense=dense or None)
        return path

    def llama(self, job: dict[str, Any], join: Any = None) -> str:
        return child([self.llama_python, "benchmarks/llama_child.py"], job, join)

    def slots(self, run: Run) -> int:
        """Bytes of the slots of that share of the experts."""
        from moeinf.checkpoint.store import ExpertStore

        store = ExpertStore.open(self.of(replace(run, format=run.of or run.format)))
        return int(store.num_layers * store.num_experts * run.share / 100) * store.slot_bytes

    def memory(self, run: Run) -> int | str:
        """The budget of a run of moeinf."""
        return f"{run.share:g}%" if run.of is None else self.slots(run)

    def limit(self, run: Run) -> int:
        """Of a share of the experts, and all else."""
        from moeinf.checkpoint.store import ExpertStore

        path = self.of(run)
        if path.suffix == ".gguf":
            import gguf

            sizes = {one.name: int(one.n_bytes) for one in gguf.GGUFReader(path).tensors}
            experts = sum(size for name, size in sizes.items() if "_exps" in name)
            dense = sum(sizes.values()) - experts
            slots = int(experts * run.share / 100)
        else:
            store = ExpertStore.open(path)
            tensors = store.checkpoint.tensors.values()
            dense = sum(entry.nbytes for entry in tensors) - store.nbytes
            slots = self.slots(run) + 2 * store.slot_bytes
        return int(1.1 * (dense + slots)) + RUNTIME.get(run.system, RUNTIME["moeinf"])


def child(command: list[Any], job: dict[str, Any], join: Any) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        done = subprocess.run(
            [*map(str, command), file.name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            preexec_fn=join,
        )
    return done.stdout


def measure(run: Run, models: Models, job: dict[str, Any]) -> dict[str, Any]:
    model = models.of(run)
    drop_from_page_cache(model)
    limit = None if run.share == 100 else models.limit(run)
    memory = models.memory(run) if run.system == "moeinf" else None
    job = {**job, "model": str(model), "system": run.system, "resident": run.share == 100,
           "limit": limit, "memory": memory}  # fmt: skip
    bounded = nullcontext(None) if limit is None else memory_cgroup(limit)
    with models.disk.set(run.read_ahead), bounded as join:
        if run.system == "llama.cpp":
            try:
                answer = models.llama({**job, "repacked": job["resident"]}, join)
            except subprocess.CalledProcessError:  # it crashes with some repacked types
                answer = models.llama({**job, "repacked": False}, join)
        else:
            answer = child([sys.executable, "-m", "benchmarks.peers", "--child"], job, join)
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    enforced = limit is not None and join is not None
    return {**found, "limit_bytes": limit, "limit_enforced": enforced}


def drop_from_page_cache(model: Path) -> None:
    for path in model.iterdir() if model.is_dir() else [model]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row_of(run: Run, found: list[dict[str, Any]]) -> dict[str, Any]:
    decode = [statistics.median(one["decode_seconds"]) for one in found]
    mean = [statistics.fmean(one["decode_seconds"]) for one in found]
    peak = max(one["peak_bytes"] for one in found)
    return {
        "name": run.name,
        "system": run.system,
        "format": run.format,
        "share": run.share,
        "read_ahead_kib": run.read_ahead,
        "tokens_per_second": 1 / min(mean),
        "median_token_seconds": decode,
        "mean_token_seconds": mean,
        "prefill_seconds": min(one["prefill_seconds"] for one in found),
        "first_token_seconds": min(
            one["load_seconds"] + one["first_token_seconds"] for one in found
        ),
        "load_seconds": min(one["load_seconds"] for one in found),
        "peak_bytes": peak,
        "peak_gb": peak / 1e9,
        "limit_bytes": found[0]["limit_bytes"],
        "limit_enforced": found[0]["limit_enforced"],
        "likeliest": found[0]["likeliest"],
        "repacked": found[0].get("repacked"),
        "runs": len(found),
    }


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    from moeinf.integrations.transformers.generation import peak_memory

    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    model = LOADERS[job["system"]](job)
    loaded = time.perf_counter()
    past: Any = None

    @torch.inference_mode()
    def run(ids: list[int]) -> tuple[float, Any]:
        nonlocal past
        began = time.perf_counter()
        answer = model(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        past = answer.past_key_values
        return time.perf_counter() - began, answer.logits[0, -1]

    first, _ = run(job["first"])
    past = None
    prefill, _ = run(job["second"])
    if job["system"] == "moeinf" and job["resident"]:
        fill_all(model)
        past = None
        prefill, _ = run(job["second"])
    count = OFFLOAD_TOKENS if job["system"] == "accelerate" else len(job["tokens"])
    for token in job["warm"] if job["system"] != "accelerate" else ():
        run([token])
    times, logits = [], None
    for token in job["tokens"][:count]:
        seconds, logits = run([token])
        times.append(seconds)
    assert logits is not None
    return {
        "load_seconds": loaded - start,
        "first_token_seconds": first,
        "prefill_seconds": prefill,
        "decode_seconds": times,
        "likeliest": int(logits.argmax()),
        "peak_bytes": peak_memory(),
    }


def load_moeinf(job: dict[str, Any]) -> Any:
    import moeinf

    return moeinf.load(
        job["model"], memory=job["memory"], fill=job["resident"], dense="auto", device="cpu"
    )


def fill_all(model: Any) -> None:
    """Every expert is in its slot when this returns."""
    store = model.moeinf.cache.store
    for layer in range(store.num_layers):
        for lease in model.moeinf.cache.waves(layer, list(range(store.num_experts))):
            lease.release()


def load_transformers(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["model"], dtype="bfloat16").eval()


def load_offloaded(job: dict[str, Any]) -> Any:
    """What stays in memory may take the limit less the interpreter and the layer in use."""
    from transformers import AutoModelForCausalLM

    from moeinf.checkpoint.store import ExpertStore

    store = ExpertStore.open(job["model"])
    room = job["limit"] - RUNTIME["moeinf"] - store.num_experts * store.layout.nbytes
    return AutoModelForCausalLM.from_pretrained(
        job["model"],
        device_map="auto",
        max_memory={"cpu": max(room, 1)},
        offload_folder=Path(job["model"]).parent / "offload",
        dtype="bfloat16",
    ).eval()


LOADERS = {
    "moeinf": load_moeinf,
    "transformers": load_transformers,
    "accelerate": load_offloaded,
}


if __name__ == "__main__":
    main()

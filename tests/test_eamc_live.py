"""A collection of activation matrices in a live cache: started from, grown, given back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import COMMON
from test_cli import moeinf as command

import moeinf
from moeinf.traces.eam import EAMC, activation_matrix
from moeinf.traces.trace import DECODE, PREFILL, Trace

SHAPE = {"num_layers": 3, "num_experts": 6}


def prompt(seed: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], (1, tokens), generator=generator)


def random_collection(seed: int, *, entries: int, capacity: int = 120) -> EAMC:
    rng = np.random.default_rng(seed)
    collection = EAMC(**SHAPE, capacity=capacity)
    for _ in range(entries):
        for of_phase in (collection.prefill, collection.decode):
            of_phase.add((rng.integers(0, 9, (3, 6)) + np.eye(3, 6)).astype(np.float32))
    return collection


def serve(model: Any, seed: int, requests: int = 4) -> Trace:
    with model.moeinf.cache.record() as recorder:
        for turn in range(requests):
            model.generate(prompt(seed + turn, 4 + turn), max_new_tokens=9, do_sample=False)
    return recorder.trace()


def entries_of(collection: EAMC) -> tuple[list[Any], list[Any]]:
    return collection.prefill.entries().tolist(), collection.decode.entries().tolist()


def grown(collection: EAMC, trace: Trace) -> tuple[list[Any], list[Any]]:
    """The entries after the requests of a trace, by the rule of section 4.2."""
    kept = [list(of_phase) for of_phase in entries_of(collection)]
    for request in trace.split():
        for phase, entries in zip((PREFILL, DECODE), kept, strict=True):
            new = activation_matrix(request, phase).astype(np.float64)
            if not new.any():
                continue
            if len(entries) < collection.capacity:
                entries.append(new.tolist())
                continue
            old = [np.array(entry) for entry in entries]
            cosines = [(new * e).sum() / np.linalg.norm(new) / np.linalg.norm(e) for e in old]
            entries[int(np.argmax(cosines))] = new.tolist()
    return kept[0], kept[1]


@pytest.mark.parametrize("slots", [1, 5, 12])
def test_a_live_run_counts_what_a_simulation_from_the_same_collection_counts(
    qwen3_folder: Path, slots: int, seed: int
) -> None:
    start = random_collection(seed, entries=7)
    model = moeinf.load(qwen3_folder, slots=slots, policy="eam", eamc=start)
    trace = serve(model, seed)
    live = model.moeinf.stats()
    replayed = moeinf.simulate(trace, policy="eam", slots=slots, eamc=start)
    assert (live["hits"], live["accesses"]) == (replayed.hits, replayed.accesses)


def test_a_collection_changes_what_is_evicted(seed: int) -> None:
    """Ten tokens use experts 0 to 2, the next ones 3 to 5: only a collection knows the change."""
    turns = np.repeat([0, 3, 0, 3], 10)
    trace = Trace.from_arrays(
        (turns[:, None, None] + np.array([[0, 1], [1, 2], [0, 2]])), num_experts=6
    )
    told = EAMC(**SHAPE)
    matrix = np.zeros((3, 6), np.float32)
    matrix[:, :3] = 1
    told.decode.add(matrix)
    rates = {
        known: moeinf.simulate(trace, policy="eam", slots=7, eamc=told if known else None).hits
        for known in (False, True)
    }
    assert rates[True] != rates[False]


@pytest.mark.parametrize(
    "options",
    [{"policy": "eam"}, {"prefetch": "eam"}, {"policy": "eam", "prefetch": "eam"}],
    ids=str,
)
@pytest.mark.parametrize("capacity", [120, 5])
def test_the_collection_comes_back_with_every_request_in_it(
    qwen3_folder: Path, options: dict[str, str], capacity: int, seed: int
) -> None:
    start = random_collection(seed, entries=4, capacity=capacity)
    before = entries_of(start)
    model = moeinf.load(qwen3_folder, slots=5, eamc=start, **options)
    assert entries_of(model.moeinf.cache.eamc()) == before
    trace = serve(model, seed)
    found = model.moeinf.cache.eamc()
    assert entries_of(found) == grown(start, trace)
    assert found.capacity == capacity
    assert entries_of(start) == before, "a cache must not change the collection it is given"


def test_asking_changes_nothing_whoever_asks_and_whenever(qwen3_folder: Path, seed: int) -> None:
    def run(asks: bool) -> tuple[Any, ...]:
        model = moeinf.load(qwen3_folder, slots=5, policy="eam")
        cache = model.moeinf.cache
        done = threading.Event()
        most = 0

        def ask() -> None:
            nonlocal most
            while not done.wait(1e-4):  # without a pause it would hardly ever leave the interpreter
                most = max(most, len(cache.eamc().decode))

        asker = threading.Thread(target=ask)
        if asks:
            asker.start()
        try:
            serve(model, seed)
        finally:
            done.set()
        if asks:
            asker.join()
            assert most <= 4
        return model.moeinf.stats()["hits"], entries_of(cache.eamc())

    assert run(asks=True) == run(asks=False)


def test_misfits_are_refused_by_name(qwen3_folder: Path) -> None:
    wrong = EAMC(num_layers=8, num_experts=32)
    with pytest.raises(ValueError, match=r"3 layers of 6 experts as in the checkpoint.*8 of 32"):
        moeinf.load(qwen3_folder, slots=4, policy="eam", eamc=wrong)
    with pytest.raises(
        ValueError, match=r"is for 'eam': policy is 'learned' and prefetch is 'off'"
    ):
        moeinf.load(qwen3_folder, slots=4, eamc=EAMC(**SHAPE))
    with pytest.raises(ValueError, match="neither its policy nor its prefetch is 'eam'"):
        moeinf.load(qwen3_folder, slots=4, prefetch="transition").moeinf.cache.eamc()
    trace = Trace.from_arrays(np.zeros((2, 3, 1), np.int16), num_experts=6)
    with pytest.raises(ValueError, match="'eam', found policy='lru'"):
        moeinf.simulate(trace, slots=4, policy="lru", eamc=EAMC(**SHAPE))


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "c.safetensors"
    first = random_collection(seed, entries=3)
    first.save(path)
    random_collection(seed + 1, entries=2).save(path)
    assert len(EAMC.load(path).decode) == 2
    first.decode = None  # what cannot be written
    with pytest.raises(AttributeError):
        first.save(path)
    assert len(EAMC.load(path).decode) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_heat_survives_a_restart_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "heat.safetensors"
    arguments = ("run", "--max-new-tokens", "6", "--json", "--eamc", str(path))
    for run in (1, 2):
        json.loads(command(*arguments, "--policy", "eam").stdout)
        heat = EAMC.load(path)
        assert (len(heat.prefill), len(heat.decode)) == (run, run)
    saved = path.read_bytes()
    assert "policy is 'learned'" in command(*arguments, expect=1).stderr
    EAMC(**SHAPE).save(path)
    refused = command(*arguments, "--prefetch", "eam", expect=1).stderr
    assert "expected 8 layers of 32 experts" in refused and "Traceback" not in refused
    path.write_bytes(saved[:-5])
    refused = command(*arguments, "--policy", "eam", expect=1).stderr
    assert "heat.safetensors" in refused and "Traceback" not in refused
    absent = (*arguments[:-1], str(tmp_path / "new.safetensors"))
    assert "neither its policy" in command(*absent, expect=1).stderr

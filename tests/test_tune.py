"""Settings are kept where they are better by more than the noise, and used where measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

import moeinf
from moeinf import profiles
from moeinf.cli import tune as command
from moeinf.experts import cpu
from moeinf.planning import tuning
from moeinf.planning.tuning import Trial

PROMPT = torch.tensor([[3, 1, 4, 1, 3, 1, 4, 1, 3, 1, 4]])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    cpu._threads = None
    cpu.default_engine.cache_clear()


def outcome(seconds: Callable[[dict[str, Any], int], float], *tried: tuple[str, Any]) -> Any:
    """Of a model whose runs take that long, by settings and number of the run."""
    runs: list[dict[str, Any]] = []
    trials: list[Trial] = []

    def run(settings: dict[str, Any]) -> float:
        runs.append(dict(settings))
        return seconds(settings, len(runs))

    found = tuning.tune(run, {"policy": "learned"}, iter(tried), trials.append)
    return found, trials, runs


def test_a_faster_setting_is_kept_and_the_next_is_tried_beside_it() -> None:
    speeds = {"learned": 1.0, "lru": 0.9, "lfu": 0.95}
    found, trials, runs = outcome(
        lambda settings, _: speeds[settings["policy"]], ("policy", "lru"), ("policy", "lfu")
    )
    assert found == {"policy": "lru"}
    assert [(one.value, one.kept) for one in trials[:2]] == [("lru", True), ("lfu", False)]
    policies = [one["policy"] for one in runs if "speculation" not in one]
    # In pairs, each way first in turn; the second candidate is dropped after its second loss.
    assert policies[1:17] == ["learned", "lru", "lru", "learned"] * 4
    assert policies[17:21] == ["lru", "lfu", "lfu", "lru"]


def test_noise_keeps_nothing() -> None:
    """The candidate wins every second pair by a third, and loses the others by as much."""

    def seconds(settings: dict[str, Any], number: int) -> float:
        slow = (number // 2) % 2 == (settings["policy"] == "lru")
        return 1.3 if slow else 1.0

    assert outcome(seconds, ("policy", "lru"))[0] == {}
    # It wins all pairs, by one percent.
    found, trials, _ = outcome(lambda s, _: 0.99 if s["policy"] == "lru" else 1, ("policy", "lru"))
    assert found == {} and len(trials[0].ratios) == tuning.PAIRS
    # One pair of eight is lost, as when another program has disturbed it.
    found, _, _ = outcome(
        lambda s, number: 3 if number == 7 else 0.9 if s["policy"] == "lru" else 1,
        ("policy", "lru"),
    )
    assert found == {"policy": "lru"}


@pytest.mark.parametrize(("costs", "expected"), [(1.2, {"speculation": False}), (0.8, {})])
def test_speculation_is_off_where_it_costs(costs: float, expected: dict[str, Any]) -> None:
    assert outcome(lambda s, _: costs if s.get("speculation") else 1)[0] == expected


def test_a_setting_that_changes_a_token_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        def __init__(self, tokens: list[int]):
            self.tokens = tokens
            self.metrics = type("Metrics", (), {"tokens_per_second": 10.0})

    answers = iter([Result([1, 2]), Result([1, 2]), Result([1, 3])])
    monkeypatch.setattr(tuning, "generate", lambda *_, **__: next(answers))
    request = tuning.Request(path=Path(), prompt="", max_new_tokens=2)
    runs = tuning.Runs(request, "25%")
    assert runs({"policy": "lru"}) == runs({}) == 0.1
    with pytest.raises(RuntimeError, match="expected the tokens of the first run"):
        runs({"policy": "lfu"})


def fingerprint(folder: Path) -> str:
    return moeinf.ExpertStore.open(folder).fingerprint


def text_of(model: Any, **options: Any) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False, **options)[0].tolist()


def test_load_uses_a_profile_where_nothing_is_given(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = moeinf.load(qwen3_folder, device="cpu", slots=4)
    expected = text_of(plain)
    settings = {
        "policy": "lru",
        "prefetch": "transition",
        "threads": 1,
        "reader_threads": 3,
        "chunk_bytes": 8192,
        "speculation": False,
    }
    profiles.write(fingerprint(qwen3_folder), "cpu", settings, str(qwen3_folder))
    model = moeinf.load(qwen3_folder, device="cpu", slots=4)
    cache = model.moeinf.cache
    assert (cache.policy, cache.prefetch_kind) == ("lru", "transition")
    assert cpu.default_engine().threads == 1
    assert text_of(model) == expected
    widths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert text_of(model, prompt_lookup_num_tokens=3) == expected
    assert widths[1:] == [1] * 11, "speculation is off"
    # What is given comes first.
    model = moeinf.load(qwen3_folder, device="cpu", slots=4, policy="lfu", prefetch="off")
    assert (model.moeinf.cache.policy, model.moeinf.cache.prefetch_kind) == ("lfu", "off")
    model = moeinf.load(qwen3_folder, device="cpu", slots=4, tuned=False)
    assert model.moeinf.cache.policy == "learned" and model.moeinf.speculation
    [row] = profiles.described()
    assert (row["path"], row["settings"], row["fault"]) == (str(qwen3_folder), settings, "")


def profile_of(folder: Path, **changes: Any) -> Path:
    file = profiles.write(fingerprint(folder), "cpu", {"policy": "lru"}, str(folder))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"checkpoint": "experts-of-another"}, "it is of experts-of-another on cpu, not of exp"),
        ({"device": "cuda"}, "on cuda, not of experts-"),
        ({"machine": "Z80, 1 usable processors"}, "it was measured with machine 'Z80, 1 usable"),
        ({"version": "0.0.1"}, "it was measured with version '0.0.1', this is"),
        ({"format": "moeinf-profile-0"}, "expected format moeinf-profile-1"),
        ({"settings": []}, "settings are [], expected an object"),
        ({"settings": {"policy": "best"}}, "policy is 'best'"),
        ({"settings": {"prefetch": 1}}, "prefetch is 1"),
        ({"settings": {"threads": 10**6}}, "threads is 1000000"),
        ({"settings": {"threads": True}}, "threads is True"),
        ({"settings": {"chunk_bytes": 100}}, "chunk_bytes is 100"),
        ({"settings": {"slots": 1}}, "slots is 1"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_a_profile_that_is_not_valid_here_is_ignored_and_that_is_said_once(
    qwen3_folder: Path, changes: dict[str, Any], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = profile_of(qwen3_folder, **changes)
    with caplog.at_level(logging.WARNING, "moeinf"):
        for _ in range(2):
            model = moeinf.load(qwen3_folder, device="cpu", slots=4)
            assert model.moeinf.cache.policy == "learned"
    [said] = [one.getMessage() for one in caplog.records if one.name == "moeinf.profiles"]
    assert said.startswith(f"{file}: the profile is ignored: ") and fault in said


@pytest.mark.parametrize("raw", ["", "{", "[" * 100_000, "null", '{"format": "moeinf-profile-1"}'])
def test_a_damaged_profile_is_ignored(
    qwen3_folder: Path, raw: str, caplog: pytest.LogCaptureFixture
) -> None:
    profile_of(qwen3_folder).write_text(raw)
    assert profiles.settings_for(fingerprint(qwen3_folder), "cpu") == {}
    assert len(caplog.records) == 1
    assert profiles.described()[0]["fault"]


def test_a_profile_of_another_model_is_not_looked_at(qwen3_folder: Path, tmp_path: Path) -> None:
    profile_of(write_checkpoint(tmp_path / "other", seed=5))
    assert moeinf.load(qwen3_folder, device="cpu", slots=4).moeinf.cache.policy == "learned"


def test_a_user_without_a_home_has_no_profiles(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert moeinf.load(qwen3_folder, device="cpu", slots=4).moeinf.cache.policy == "learned"
    assert profiles.described() == []


def test_the_command_measures_writes_and_says_what_it_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "PAIRS", 2)
    monkeypatch.setattr(tuning, "candidates", lambda _: iter([("policy", "lru")]))
    command.command(max_new_tokens=8, device="cpu", json=True)
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [one["setting"] for one in found["trials"]] == ["policy", "speculation"]
    assert "policy=lru: " in shown.err and "pairs, " in shown.err
    [row] = profiles.described()
    assert row["file"] == found["profile"] and row["settings"] == found["settings"]
    assert row["fault"] == ""

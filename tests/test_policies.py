"""Policies beyond lru and lfu, against slow references; collections; hooks."""

from __future__ import annotations

import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_traces import random_trace
from safetensors.numpy import save_file

import moeinf
from moeinf import _core
from moeinf.errors import TraceError
from moeinf.traces.eam import EAMC, activation_matrix
from moeinf.traces.simulator import policy_names
from moeinf.traces.trace import DECODE, PREFILL, Trace

EXAMPLES = Path(__file__).parent.parent / "examples"


class Classes:
    """classlru from its description: every class and age computed anew at each decision."""

    def __init__(self, total: int) -> None:
        self.count = [0] * total
        self.last = [-1] * total
        self.token = -1
        self.layer = 0
        self.now = 0

    def observe(self, step: Any) -> None:
        if step.new_sequence or step.layer <= self.layer:
            self.token += 1
            if self.token and self.token % 128 == 0:
                self.count = [count // 2 for count in self.count]
        self.layer = step.layer
        self.now = step.index
        for expert in step.experts.tolist():
            self.count[expert] += 1
            self.last[expert] = step.index

    def score(self, residents: np.ndarray) -> np.ndarray:
        scores = []
        for expert in residents.tolist():
            of_class = min(7, int(math.log2(max(1, self.count[expert]))))
            scores.append(-(self.now - self.last[expert]) / 2**of_class)
        return np.array(scores)


class Activations:
    """eam from its description, in float64, with all distances computed anew at each decision."""

    def __init__(self, shape: tuple[int, int], given: dict[int, np.ndarray], capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.entries = {phase: list(given[phase].astype(np.float64)) for phase in (0, 1)}
        self.request = {phase: np.zeros(shape) for phase in (0, 1)}
        self.current = np.zeros(shape)
        self.layer = -1

    def observe(self, step: Any) -> None:
        if step.new_sequence:
            for phase in (0, 1):
                if self.request[phase].any():
                    self.finish(phase)
                self.request[phase] = np.zeros(self.shape)
        if step.new_sequence or step.layer <= self.layer:
            self.current = np.zeros(self.shape)
        self.layer = step.layer
        self.phase = 0 if step.prefill else 1
        for matrix in (self.current, self.request[self.phase]):
            matrix.ravel()[step.experts] += step.counts

    def finish(self, phase: int) -> None:
        new, entries = self.request[phase], self.entries[phase]
        if len(entries) < self.capacity:
            entries.append(new)
            return
        cosines = [(e * new).sum() / np.linalg.norm(e) / np.linalg.norm(new) for e in entries]
        entries[int(np.argmax(cosines))] = new

    def score(self, residents: np.ndarray) -> np.ndarray:
        rows = slice(0, self.layer + 1)
        entries = self.entries[self.phase]
        cosines = []
        for entry in entries:
            norms = np.linalg.norm(entry[rows]) * np.linalg.norm(self.current[rows])
            cosines.append((entry[rows] * self.current[rows]).sum() / norms if norms else 0.0)
        nearest = [i for i in np.argsort(-np.array(cosines), kind="stable")[:3] if cosines[i] > 0]
        total = sum((entries[i] for i in nearest), np.zeros(self.shape))
        if not nearest:
            total = self.request[self.phase]
        sums = total.sum(1, keepdims=True)
        share = np.where(sums > 0, total / np.where(sums > 0, sums, 1), 1 / self.shape[1])
        layers = np.arange(self.shape[0])[:, None]
        return ((share + 1e-6) * (1 - layers / self.shape[0])).ravel()[residents]


@pytest.mark.parametrize("slots", [1, 9, 20, 40])
def test_classlru_decides_like_its_description(slots: int, seed: int) -> None:
    trace = random_trace(seed, sequences=12, decode=60)
    reference = moeinf.simulate(trace, policy=Classes(trace.total_experts), slots=slots)
    found = moeinf.simulate(trace, policy="classlru", slots=slots)
    assert found.as_dict()["layers"] == reference.as_dict()["layers"]


def test_eam_decides_like_its_description(seed: int) -> None:
    trained = EAMC.from_traces([random_trace(seed + 1, sequences=9)], capacity=6)
    given = {PREFILL: trained.prefill.entries(), DECODE: trained.decode.entries()}
    trace = random_trace(seed, sequences=8)
    reference = Activations((trace.num_layers, trace.num_experts), given, 6)
    expected = moeinf.simulate(trace, policy=reference, slots=15)
    found = moeinf.simulate(trace, policy="eam", slots=15, eamc=trained)
    # Ties in float64 may fall the other way in float32: a few decisions of hundreds.
    assert abs(found.hits - expected.hits) <= 0.02 * expected.accesses
    assert len(trained.decode) == 6, "a simulation must not change the collection it is given"


def test_activation_matrices_count_tokens(seed: int) -> None:
    trace = random_trace(seed)
    for phase in (PREFILL, DECODE):
        expected = np.zeros((trace.num_layers, trace.num_experts))
        for token in range(trace.num_tokens):
            if trace.phase[token] == phase:
                for layer, experts in enumerate(trace.experts[token].tolist()):
                    for expert in experts:
                        if expert >= 0:
                            expected[layer, expert] += 1
        np.testing.assert_array_equal(activation_matrix(trace, phase), expected)


def test_a_full_collection_replaces_the_nearest_entry(seed: int) -> None:
    rng = np.random.default_rng(seed)
    collection = _core.EamCollection(4, 6, 5)
    kept: list[np.ndarray] = []
    for _ in range(25):
        matrix = rng.integers(0, 4, (4, 6)).astype(np.float32)
        matrix[0, 0] += 1
        if len(kept) < 5:
            kept.append(matrix)
        else:
            cosines = [
                (matrix * e).sum(dtype=np.float64) / np.linalg.norm(e.astype(np.float64))
                for e in kept
            ]
            kept[int(np.argmax(cosines))] = matrix
        collection.add(matrix)
        np.testing.assert_array_equal(collection.entries(), np.stack(kept))


def test_a_growing_matrix_finds_what_a_fresh_search_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts, size = 6, 9, 40
    collection = _core.EamCollection(layers, experts, size)
    entries = rng.random((size, layers, experts)).astype(np.float32)
    for entry in entries:
        collection.add(entry)
    match = _core.EamMatch(collection)
    for _ in range(3):
        match.restart()
        assert match.nearest(3) == []
        partial = np.zeros((layers, experts))
        for layer in range(layers):
            chosen = rng.choice(experts, 4, replace=False)
            counts = rng.integers(1, 5, 4)
            partial[layer, chosen] = counts
            match.add_row(
                layer, (layer * experts + chosen).astype(np.int32), counts.astype(np.int32)
            )
            rows = entries[:, : layer + 1].astype(np.float64)
            cosines = (rows * partial[: layer + 1]).sum((1, 2)) / np.sqrt((rows**2).sum((1, 2)))
            assert match.nearest(7) == np.argsort(-cosines)[:7].tolist()
    predicted = collection.predict([3, 8])
    total = entries[3].astype(np.float64) + entries[8]
    np.testing.assert_allclose(predicted, total / total.sum(1, keepdims=True), rtol=1e-5)


def test_a_collection_survives_its_file(tmp_path: Path, seed: int) -> None:
    collection = EAMC.from_traces([random_trace(seed)], capacity=9)
    collection.save(tmp_path / "c.safetensors")
    loaded = EAMC.load(tmp_path / "c.safetensors")
    assert loaded.capacity == 9
    for one, other in ((collection.prefill, loaded.prefill), (collection.decode, loaded.decode)):
        np.testing.assert_array_equal(one.entries(), other.entries())


def test_bad_collections_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    metadata = {"format": "moeinf-eamc-1", "capacity": "4"}
    good = np.ones((2, 3, 5), np.float32)
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({"prefill": good}, metadata, "tensor 'decode': expected, but not found"),
        ({"prefill": good, "decode": good}, metadata | {"format": "x"}, "'format': expected"),
        ({"prefill": good, "decode": good}, metadata | {"capacity": "1"}, "at most 1"),
        ({"prefill": good[:, :2], "decode": good}, metadata, "tensor 'prefill'"),
        ({"prefill": good, "decode": good.astype(np.float16)}, metadata, "tensor 'decode'"),
        ({"prefill": good * np.nan, "decode": good}, metadata, "expected counts"),
        ({"prefill": good, "decode": good * 0}, metadata, "expected a use"),
    ]
    for tensors, facts, message in cases:
        save_file(tensors, path, metadata=facts)
        with pytest.raises(TraceError, match=message):
            EAMC.load(path)
    whole = path.read_bytes()
    for content in (b"nothing", b"", whole[:9], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"c\.safetensors: not a readable"):
            EAMC.load(path)
    with pytest.raises(ValueError, match="collection: expected 5 layers of 11 experts"):
        moeinf.simulate(
            random_trace(1), slots=4, policy="eam", eamc=EAMC(num_layers=3, num_experts=5)
        )


def cyclic_trace(tokens: int) -> Trace:
    """Every token uses one pair of each layer's experts, and the pairs follow a fixed order.

    Frequency and recency cannot see this order. The experts that were just active show it.
    """
    rng = np.random.default_rng(7)
    layers, pairs = 6, 8
    order = np.arange(tokens) % pairs
    tables = np.stack([rng.permutation(2 * pairs).reshape(pairs, 2) for _ in range(layers)])
    return Trace.from_arrays(tables[:, order].transpose(1, 0, 2), num_experts=2 * pairs)


def test_learned_learns_what_recency_and_frequency_cannot_see() -> None:
    trace = cyclic_trace(1500)
    rates = {
        policy: moeinf.simulate(trace, policy=policy, slots="50%").hit_rate_decode
        for policy in policy_names()
    }
    assert rates["lru"] == 0.0
    better = max(rates[policy] for policy in ("lru", "lfu", "decayed_lfu", "classlru"))
    assert rates["learned"] > better + 0.5 * (rates["belady"] - better), rates


def test_learned_does_not_collapse_below_a_tokens_working_set() -> None:
    # Each layer has two favourites and a tail; lru hits nothing with fewer slots than layers * k.
    rng = np.random.default_rng(5)
    layers, tokens = 12, 400
    experts = np.empty((tokens, layers, 2), np.int16)
    for token in range(tokens):
        for layer in range(layers):
            experts[token, layer, 0] = rng.integers(0, 2)
            experts[token, layer, 1] = 2 + rng.integers(0, 14)
    trace = Trace.from_arrays(experts, num_experts=16)
    assert moeinf.simulate(trace, policy="lru", slots=20).hit_rate_decode == 0.0
    assert moeinf.simulate(trace, policy="learned", slots=20).hit_rate_decode > 0.2


class Oracle:
    """A hook that knows the next token."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.token = 0

    def observe(self, experts: np.ndarray, new_sequence: bool) -> np.ndarray:
        self.token += len(experts)
        priors = np.full((self.trace.num_layers, self.trace.num_experts), 0.05)
        if self.token < self.trace.num_tokens:
            for layer, used in enumerate(self.trace.experts[self.token].tolist()):
                priors[layer, [e for e in used if e >= 0]] = 0.95
        return priors


def test_good_priors_raise_the_hit_rate_of_best(seed: int) -> None:
    trace = random_trace(seed, layers=6, num_experts=24, k=3, sequences=6, decode=120)
    alone = moeinf.simulate(trace, slots="20%")
    told = moeinf.simulate(trace, slots="20%", priors=Oracle(trace))
    assert told.hits > alone.hits


class Failing(Oracle):
    """Good priors for ten passes, then the result of `fail`."""

    def __init__(self, trace: Trace, fail: Any) -> None:
        super().__init__(trace)
        self.calls = 0
        self.fail = fail

    def observe(self, experts: np.ndarray, new_sequence: bool) -> np.ndarray:
        self.calls += 1
        priors = super().observe(experts, new_sequence)
        return priors if self.calls <= 10 else self.fail(priors)


def raise_an_error(priors: np.ndarray) -> np.ndarray:
    raise RuntimeError("broken hook")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (raise_an_error, "broken hook"),
        (lambda priors: priors * np.nan, "NaN"),
        (lambda priors: priors[:-1], "shape"),
        (lambda priors: "no array", "could not convert"),
    ],
)
def test_a_hook_that_fails_costs_one_warning_and_the_last_good_priors_stay(
    fail: Any, message: str
) -> None:
    trace = random_trace(11, layers=6, num_experts=24, decode=60)
    # The reference goes quiet instead of failing.
    quiet = moeinf.simulate(trace, slots="20%", priors=Failing(trace, lambda priors: None))
    hook = Failing(trace, fail)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        found = moeinf.simulate(trace, slots="20%", priors=hook)
    assert len(caught) == 1
    assert hook.calls > 12
    assert found.as_dict() == quiet.as_dict()


def test_the_example_policies_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["policy.py"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(EXAMPLES / "policy.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "MyPolicy" in printed and "learned" in printed


def test_parameters_change_a_policy_and_their_usual_values_do_not(seed: int) -> None:
    trace = random_trace(seed)

    def counts(policy: str) -> list[int]:
        result = moeinf.simulate(trace, policy=policy, slots="30%")
        assert result.policy == policy
        return [*result.decode_hits.tolist(), *result.prefill_hits.tolist()]

    for name in moeinf.policies():
        parameters = _core.policy_parameters(name)
        usual = "".join(f":{key}={value!r}" for key, (value, _, _) in parameters.items())
        assert counts(name + usual) == counts(name)
        for key, (value, least, greatest) in parameters.items():
            assert least <= value <= greatest
            _ = counts(f"{name}:{key}={least!r}"), counts(f"{name}:{key}={greatest!r}")


class HalvedFrequency:
    """decayed_lfu:keep=0.5:layer_weight=0.25 from its definition; of 4 layers all is exact."""

    def __init__(self) -> None:
        self.token, self.layer = -1, 3
        self.uses: dict[int, list[int]] = {}

    def observe(self, step: Any) -> None:
        self.token += step.new_sequence or step.layer <= self.layer
        self.layer = step.layer
        for expert in step.experts.tolist():
            self.uses.setdefault(expert, []).append(self.token)

    def score(self, residents: np.ndarray) -> np.ndarray:
        def one(expert: int) -> float:
            distance = (expert // 20 - self.layer - 1) % 4 + 1
            average = sum(0.5 ** (self.token - use) for use in self.uses[expert][-40:])
            return average * (1 - 0.25 * distance / 4)

        return np.array([one(expert) for expert in residents.tolist()])


def test_decayed_lfu_with_other_parameters_is_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.minimum(*rng.integers(0, 20, (2, 150, 4, 1)))
    trace = Trace.from_arrays(experts, num_experts=20)
    slow = moeinf.simulate(trace, policy=HalvedFrequency(), slots=30)
    fast = moeinf.simulate(trace, policy="decayed_lfu:keep=0.5:layer_weight=0.25", slots=30)
    assert fast.decode_hits.tolist() == slow.decode_hits.tolist()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            "decayed_lfu:kept=0.5",
            r"'kept'; there are: keep \(0.01 to 1, usually 0.95\)",
        ),
        ("decayed_lfu:keep=2", r"'keep'.*expected 0.01 to 1, found '2'"),
        ("decayed_lfu:keep=nan", "found 'nan'"),
        ("decayed_lfu:keep=0.5x", "found '0.5x'"),
        ("decayed_lfu:keep", "found ''"),
        ("lru:", "no parameter ''; there are: none"),
        ("decayed_lfu:keep=0.9:", "no parameter ''"),
        ("lru:keep=1", "no parameter 'keep'; there are: none"),
        ("fifo:keep=1", "no policy is named 'fifo'"),
        ("belady:keep=1", "no parameters"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moeinf.simulate(random_trace(1), policy=policy, slots=3)

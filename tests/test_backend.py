"""What computes out of a cache: found by the cache's name, called by several threads, compiled."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library
from torch.utils._python_dispatch import TorchDispatchMode

import moeinf
from moeinf.traces.eam import activation_matrix
from moeinf.traces.trace import DECODE, PREFILL, Trace

EXPERTS, HIDDEN = 6, 40


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


def prompt(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], shape, generator=generator)


def random_step(seed: int, tokens: int, top_k: int = 2) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=make)
    weights, ids = scores.topk(top_k)
    return torch.randn(tokens, HIDDEN, generator=make), ids, weights


def test_a_name_is_used_once(store: moeinf.ExpertStore) -> None:
    first = moeinf.ExpertCache(store, slots=3, name="mine")
    second = moeinf.ExpertCache(store, slots=3, name="mine")
    assert (first.name, second.name) == ("mine", "mine#2")
    hidden, ids, weights = random_step(1, 2)
    expected = moeinf.fused_experts(hidden, ids, weights, first, 0)
    assert torch.equal(torch.ops.moeinf.fused_experts(hidden, ids, weights, "mine", 0), expected)
    del first
    gc.collect()
    third = moeinf.ExpertCache(store, slots=3, name="mine")
    assert third.name == "mine#3"
    with pytest.raises(ValueError, match=r"no cache is named 'mine'.*released"):
        torch.ops.moeinf.fused_experts(hidden, ids, weights, "mine", 0)
    with pytest.raises(ValueError, match="no cache is named 'other': load its model first"):
        torch.ops.moeinf.fused_experts(hidden, ids, weights, "other", 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_does_not_keep_its_cache_alive(store: moeinf.ExpertStore, device: str) -> None:
    cache = moeinf.ExpertCache(store, device=device, slots=3)
    moeinf.fused_experts(*random_step(1, 2), cache, 0)
    ended = threading.Event()
    weakref.finalize(cache, ended.set)
    del cache
    assert ended.is_set(), "without the garbage collector's help"


def test_a_function_that_calls_it_compiles_whole(store: moeinf.ExpertStore, seed: int) -> None:
    caches = [moeinf.ExpertCache(store, slots=slots) for slots in (18, 1)]

    def layer(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, cache: Any) -> Any:
        return hidden + moeinf.fused_experts(2 * hidden, ids, weights, cache, 1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    step = random_step(seed, 5)
    for cache in caches:
        assert torch.equal(compiled(*step, cache), layer(*step, cache))
        assert cache.stats()["accesses"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("slots", "tokens"), [(1, 7), (18, 1), (18, 40)])
def test_two_ids_mean_no_expert(
    store: moeinf.ExpertStore, device: str, dtype: torch.dtype, slots: int, tokens: int, seed: int
) -> None:
    """-1, and the number of experts, which is what transformers writes."""
    cache = moeinf.ExpertCache(store, device=device, slots=slots)
    hidden, ids, weights = random_step(seed, tokens)
    absent = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    if tokens > 1:
        absent[0] = True
    weights = weights.masked_fill(absent, 1e6)  # would show
    with cache.record() as recorder:
        for layer in range(3):
            minus = ids.masked_fill(absent, -1).to(dtype)
            expected = moeinf.fused_experts(hidden, minus, weights, cache, layer)
        for layer in range(3):
            past = ids.masked_fill(absent, EXPERTS).to(dtype)
            found = moeinf.fused_experts(hidden, past, weights, cache, layer)
    assert torch.equal(found, expected)
    if tokens > 1:
        assert torch.equal(found[0], torch.zeros(HIDDEN))
    assert torch.isfinite(found).all()
    traced = torch.from_numpy(recorder.trace().experts[:, 0].astype(int))
    assert torch.equal(traced, ids.masked_fill(absent, -1).repeat(2, 1))
    used = sum(len(set(one[one >= 0].tolist())) for one in [ids.masked_fill(absent, -1)])
    assert cache.stats()["accesses"] == 6 * used  # in three layers, twice: nothing else is read


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-2, EXPERTS + 1, 2**31 - 1, -(2**31)])
def test_any_other_id_is_named_with_its_place(
    store: moeinf.ExpertStore, device: str, dtype: torch.dtype, bad: int
) -> None:
    cache = moeinf.ExpertCache(store, device=device, slots=4)
    hidden, ids, weights = random_step(3, 5)
    ids = ids.to(dtype)
    good = moeinf.fused_experts(hidden, ids, weights, cache, 1)
    wrong = ids.clone()
    wrong[3, 1] = bad
    with pytest.raises(ValueError, match=rf"-1 to 6, found {bad} at token 3, position 1"):
        moeinf.fused_experts(hidden, wrong, weights, cache, 1)
    assert torch.equal(moeinf.fused_experts(hidden, ids, weights, cache, 1), good)


def run_together(*calls: Callable[[], None]) -> None:
    """Runs them on threads of their own; what one raises is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def guarded(call: Callable[[], None]) -> None:
        try:
            start.wait()
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def parts(trace: Trace) -> list[tuple[Any, ...]]:
    """Each sequence's routing and phases, whatever its number."""
    return sorted(
        (one.experts.tolist(), one.phase.tolist(), one.weights.tolist()) for one in trace.split()
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_threads_generate_on_one_model(qwen3_folder: Path, device: str, seed: int) -> None:
    """Their tokens and their traces are those of runs alone, sequence numbers aside."""
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter serves one thread")
    prompts = [prompt(seed, 1, 5), prompt(seed + 1, 2, 4)]
    arguments: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}

    alone = moeinf.load(qwen3_folder, device=device, slots=5)
    expected, traces = [], []
    for one in prompts:
        with alone.moeinf.cache.record(router=True) as recorder:
            expected.append(alone.generate(one, **arguments))
        traces.append(recorder.trace())

    shared = moeinf.load(qwen3_folder, device=device, slots=5)
    found: list[torch.Tensor] = [torch.empty(0)] * 2

    def generate(index: int) -> None:
        found[index] = shared.generate(prompts[index], **arguments)

    with shared.moeinf.cache.record(router=True) as recorder:
        run_together(lambda: generate(0), lambda: generate(1))
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one, wanted)
    trace = recorder.trace()
    assert parts(trace) == sorted(part for one in traces for part in parts(one))
    assert sorted(set(trace.sequence.tolist())) == [0, 1, 2]
    assert trace.router is not None
    routers = [one.router.sum() for one in traces if one.router is not None]
    assert trace.router.astype(float).sum() == pytest.approx(float(sum(routers)), rel=0.01)


def test_two_threads_collect_their_own_matrices(qwen3_folder: Path, seed: int) -> None:
    shared = moeinf.load(qwen3_folder, slots=5, policy="eam")
    cache = shared.moeinf.cache

    def generate(turn: int) -> None:
        shared.generate(prompt(seed + turn, 1, 5), max_new_tokens=6, do_sample=False)

    with cache.record() as recorder:
        run_together(lambda: generate(0), lambda: generate(1), lambda: generate(2))
    collected = cache.eamc()
    for phase, of_phase in ((PREFILL, collected.prefill), (DECODE, collected.decode)):
        expected = [activation_matrix(one, phase).tolist() for one in recorder.trace().split()]
        assert sorted(of_phase.entries().tolist()) == sorted(expected)


def test_steps_of_two_threads_layer_by_layer_in_turn(store: moeinf.ExpertStore) -> None:
    """A prompt of one thread between the layers of another one's decode pass."""
    cache = moeinf.ExpertCache(store, slots=4)
    turn = threading.Condition()
    now = [0]

    def steps(who: int, passes: list[tuple[moeinf.ForwardPass, int]]) -> None:
        for one, tokens in passes:
            for layer in range(3):
                with turn:
                    turn.wait_for(lambda: now[0] % 2 == who)
                    hidden = torch.ones(tokens, HIDDEN)
                    ids = torch.tensor([[layer + who, 5]] * tokens)
                    moeinf.fused_experts(
                        hidden, ids, torch.ones(tokens, 2), cache, layer, forward_pass=one
                    )
                    now[0] += 1
                    turn.notify_all()

    def prompt_of(batch: int) -> moeinf.ForwardPass:
        return moeinf.ForwardPass(prefill=True, new_sequence=True, batch=batch)

    with cache.record() as recorder:
        run_together(
            lambda: steps(0, [(prompt_of(1), 4), (moeinf.ForwardPass(), 1)]),
            lambda: steps(1, [(prompt_of(2), 6), (moeinf.ForwardPass(batch=2), 2)]),
        )
    trace = recorder.trace()
    found = {
        (tuple(one.experts[:, 0, 0].tolist()), tuple(one.phase.tolist())) for one in trace.split()
    }
    assert found == {
        ((0,) * 5, (PREFILL,) * 4 + (DECODE,)),
        ((1,) * 4, (PREFILL,) * 3 + (DECODE,)),
    }
    assert len(trace.split()) == 3


def test_tokens_of_a_batch_that_name_their_sequences(store: moeinf.ExpertStore) -> None:
    """Sequences join and leave between passes; a number is the same sequence again."""
    cache = moeinf.ExpertCache(store, slots=4)
    passes = [[7, 7, 9], [9, 7], [3, 7], [3]]
    with cache.record() as recorder:
        for number, sequences in enumerate(passes):
            one = moeinf.ForwardPass(prefill=number == 0, sequences=sequences)
            for layer in range(3):
                ids = torch.tensor([[s % EXPERTS] for s in sequences])
                moeinf.fused_experts(
                    torch.ones(len(sequences), HIDDEN),
                    ids,
                    torch.ones(len(sequences), 1),
                    cache,
                    layer,
                    forward_pass=one,
                )
    trace = recorder.trace()
    assert trace.sequence.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert trace.experts[:, 0, 0].tolist() == [1] * 4 + [3] * 4
    assert trace.phase.tolist() == [0, 0, 1, 1, 0, 1, 1, 1]


def test_passes_of_two_callers_in_turn_on_one_thread(store: moeinf.ExpertStore) -> None:
    """An event loop that runs two requests layer by layer: each pass begins once, none is lost."""
    cache = moeinf.ExpertCache(store, slots=4, policy="eam")
    with cache.record() as recorder:
        for number, sizes in enumerate([(4, 2), (1, 1), (1, 1)]):
            first = number == 0
            both = [
                moeinf.ForwardPass(prefill=first, new_sequence=first, caller=caller)
                for caller in (70, 71)
            ]
            for layer in range(3):
                for who, tokens in enumerate(sizes):
                    ids = torch.tensor([[layer + who, 5]] * tokens)
                    moeinf.fused_experts(
                        torch.ones(tokens, HIDDEN),
                        ids,
                        torch.ones(tokens, 2),
                        cache,
                        layer,
                        forward_pass=both[who],
                    )
    trace = recorder.trace()
    assert [one.experts[:, :, 0].tolist() for one in trace.split()] == [
        [[0, 1, 2]] * 6,
        [[1, 2, 3]] * 4,
    ]
    assert [one.phase.tolist() for one in trace.split()] == [[0] * 4 + [1] * 2, [0] * 2 + [1] * 2]
    assert len(cache.eamc().prefill.entries()) == 2  # one for each request, not for each turn


def test_a_pass_of_other_tokens_than_it_says_is_not_recorded(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, slots=4)
    with pytest.raises(ValueError, match="batch of 1 or more, found 0"):
        moeinf.ForwardPass(batch=0)
    for one, words in (
        (moeinf.ForwardPass(sequences=[1, 2]), "sequence of each of 3 tokens, found 2"),
        (moeinf.ForwardPass(batch=2), "2 sequences of equal length, found 3 tokens"),
    ):
        with cache.record(), pytest.raises(ValueError, match=words):
            step = torch.ones(3, HIDDEN), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)
            moeinf.fused_experts(*step, cache, 0, forward_pass=one)


def test_the_output_of_strided_tokens_is_as_torch_compile_expects(
    store: moeinf.ExpertStore,
) -> None:
    cache = moeinf.ExpertCache(store, slots=4)
    hidden = torch.randn(HIDDEN, 4).t()
    ids, weights = torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1)
    torch.library.opcheck(torch.ops.moeinf.fused_experts, (hidden, ids, weights, cache.name, 0))
    assert moeinf.fused_experts(hidden, ids, weights, cache, 0).is_contiguous()


def test_who_has_a_cache_has_the_operators() -> None:
    """Also where nothing else of the package was used."""
    program = "import moeinf, torch; moeinf.ExpertCache; print(torch.ops.moeinf.fused_experts)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "moeinf.fused_experts\n", ran.stderr


def test_who_watches_operators_sees_the_step(store: moeinf.ExpertStore) -> None:
    """Where nobody does, a step does not go through torch's dispatcher."""
    cache = moeinf.ExpertCache(store, slots=4)
    step = random_step(1, 3)
    expected = moeinf.fused_experts(*step, cache, 0)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, *call: Any) -> Any:
            seen.append(str(function))
            return function(*call[1], **(call[2] or {}))

    with Watch():
        assert torch.equal(moeinf.fused_experts(*step, cache, 0), expected)
    assert "moeinf.fused_experts.default" in seen
    with torch.profiler.profile() as profiled:
        moeinf.fused_experts(*step, cache, 0)
    assert "moeinf::fused_experts" in {event.key for event in profiled.key_averages()}
    traced = torch.jit.trace(
        lambda hidden: moeinf.fused_experts(hidden, *step[1:], cache, 0), step[0]
    )
    assert "moeinf::fused_experts" in str(traced.graph)


class OldTensor(torch.Tensor):
    """As torch before 2.10 has them: DLPack has no table of functions."""

    __dlpack_c_exchange_api__ = None


def test_tensors_of_any_kind_give_the_same(store: moeinf.ExpertStore, seed: int) -> None:
    """With gaps between elements, of a subclass, of another type; no tokens, no routes."""
    cache = moeinf.ExpertCache(store, slots=4)
    hidden, ids, weights = random_step(seed, 5)
    expected = moeinf.fused_experts(hidden, ids, weights, cache, 0)
    kinds: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda one: one.t().contiguous().t(),
        lambda one: torch.stack([one, one], -1)[..., 0],
        lambda one: torch.cat([one, one], 1)[:, : one.shape[1]],
        lambda one: one.as_subclass(OldTensor),
        lambda one: one.as_subclass(OldTensor).t().contiguous().t(),
        torch.nn.Parameter,
    ]
    for place in range(3):
        for kind in kinds[:-1] if place == 1 else kinds:
            step = [hidden, ids, weights]
            step[place] = kind(step[place])
            with torch.no_grad():
                assert torch.equal(moeinf.fused_experts(*step, cache, 0), expected)
    assert torch.equal(moeinf.fused_experts(hidden, ids.int(), weights, cache, 0), expected)
    assert moeinf.fused_experts(hidden[:0], ids[:0], weights[:0], cache, 0).shape == (0, HIDDEN)
    none = moeinf.fused_experts(hidden, ids[:, :0], weights[:, :0], cache, 0)
    assert torch.equal(none, torch.zeros_like(hidden))


def test_tensors_on_the_meta_device_do_not_mix_with_others(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, slots=4)
    step = random_step(1, 3)
    for odd in range(3):
        mixed = [one.to("meta") if i == odd else one for i, one in enumerate(step)]
        with pytest.raises(ValueError, match="expected one device, found cpu, meta"):
            moeinf.fused_experts(*mixed, cache, 0)
    assert moeinf.fused_experts(*[one.to("meta") for one in step], cache, 0).is_meta


def test_a_model_compiles_whole(qwen3_folder: Path, seed: int) -> None:
    """With tokens, gradients, and prompts of several lengths by one graph."""
    model = moeinf.load(qwen3_folder, slots=4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 9, 12):
            tokens = prompt(seed, 2, length)
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    grads = []
    for one in (model, compiled):
        model.zero_grad()
        one(tokens, labels=tokens).loss.backward()
        grads.append(model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


RUN_EXPORTED = """
import sys, torch, moeinf; moeinf.fused_experts  # registers the operator
program = torch.export.load(sys.argv[1]).module()
step = torch.load(sys.argv[2])
try:
    program(*step)
except ValueError as error:
    assert "load its model first" in str(error), error
other = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[4]), slots=2)
try:
    program(*step)
    raise SystemExit("another model's experts answered")
except ValueError as error:
    assert "load its model first" in str(error), error
cache = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[3]), slots=2)
torch.save(program(*step), sys.argv[2])
"""


def test_an_exported_program_finds_its_experts_in_another_process(
    qwen3_folder: Path, tmp_path: Path, seed: int
) -> None:
    """And those of no other model, of the same sizes and names."""
    write_checkpoint(tmp_path / "other", seed=5)

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
            return hidden + moeinf.fused_experts(2 * hidden, ids, weights, cache, 1)

    first = moeinf.ExpertStore.open(qwen3_folder)
    assert first.fingerprint == moeinf.ExpertStore.open(qwen3_folder).fingerprint
    assert first.fingerprint != moeinf.ExpertStore.open(tmp_path / "other").fingerprint
    cache = moeinf.ExpertCache(first, slots=4, name=first.fingerprint + "-exported")
    shutil.copytree(qwen3_folder, tmp_path / "copy")
    step = random_step(seed, 5)
    tokens = torch.export.Dim("tokens", min=2)
    shapes = ({0: tokens},) * 3
    program = torch.export.export(Layer(), step, dynamic_shapes=shapes)
    graph = program.graph_module.code
    assert cache.name in graph
    for node in program.graph.nodes:  # as in a process that made no cache before
        node.args = tuple(first.fingerprint if a == cache.name else a for a in node.args)
    torch.export.save(program, tmp_path / "layer.pt2")
    longer = random_step(seed + 1, 9)
    torch.save(longer, tmp_path / "step.pt")
    paths = [tmp_path / "layer.pt2", tmp_path / "step.pt", tmp_path / "copy", tmp_path / "other"]
    run = subprocess.run(
        [sys.executable, "-c", RUN_EXPORTED, *map(str, paths)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "step.pt"), Layer()(*longer))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_into_a_tensor_of_the_caller(
    store: moeinf.ExpertStore, device: str, compiled: bool, seed: int
) -> None:
    cache = moeinf.ExpertCache(store, device=device, slots=3)
    hidden, ids, weights = random_step(seed, 4)
    expected = moeinf.fused_experts(hidden, ids, weights, cache, 1)
    out = torch.full_like(hidden, torch.nan)
    address = out.data_ptr()

    def layer(hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        moeinf.fused_experts_out(hidden, ids, weights, cache, 1, out=out)
        return out * 2

    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(hidden, out), expected * 2)
    assert torch.equal(out, expected)
    assert out.data_ptr() == address
    moeinf.fused_experts_out(hidden, ids, weights, cache, 1, out=hidden)
    assert torch.equal(hidden, expected)


def test_into_a_tensor_that_does_not_fit(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, slots=3)
    hidden, ids, weights = random_step(1, 4)
    for out in (hidden[:3], hidden.double(), hidden[:, :-1], hidden.to("meta")):
        with pytest.raises(ValueError, match=r"(?s)out: expected float32 \[4, 40\] on cpu.*found"):
            moeinf.fused_experts_out(hidden, ids, weights, cache, 0, out=out)
    with pytest.raises(ValueError, match="no gradients"):
        moeinf.fused_experts_out(
            hidden.requires_grad_(), ids, weights, cache, 0, out=torch.empty_like(hidden)
        )

"""A trace holds the text of a run: each token once, in its sequence, as prompt or as decoded.

The reference is the finished text. It goes through an unserved model of transformers in one pass,
and the ids that reach its experts are what a trace of the run must hold, however the run came to
that text.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import COMMON, write_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import moeinf
from moeinf.traces.trace import DECODE, PREFILL, Trace

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
FAMILIES = ["qwen3_moe", "deepseek_v3"]


def random_ids(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, COMMON["vocab_size"], shape, generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def serve(folder: Path) -> Any:
    model = moeinf.load(folder, slots=5)
    model.generation_config.eos_token_id = COMMON["vocab_size"]  # no text ends by chance
    return model


def routing_of(folder: Path) -> Any:
    """routing(text) -> sorted ids [tokens, layers, k] of a text, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))

    def of(text: torch.Tensor) -> np.ndarray:
        seen.clear()
        with torch.no_grad():
            model(text[None])
        return np.sort(torch.stack(seen, dim=1).numpy(), axis=-1)

    return of


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    return serve(folder)


@pytest.fixture(scope="module")
def routing(folder: Path) -> Any:
    return routing_of(folder)


def expect(trace: Trace, texts: list[tuple[int, torch.Tensor]], routing: Any) -> None:
    """Each (columns of the prompt, text) is one sequence of the trace, and there is no other."""
    parts = trace.split()
    assert len(parts) == len(texts)
    for part, (prompt, text) in zip(parts, texts, strict=True):
        expected = routing(text)
        phases = [PREFILL] * prompt + [DECODE] * (len(text) - prompt)
        assert part.phase.tolist() == phases
        found = np.sort(part.experts, axis=-1)
        differ = (found != expected).any((1, 2))
        assert differ.sum() <= 1, "more than one near tie that fell the other way"


def text_of(output: torch.Tensor) -> torch.Tensor:
    """What went through the model: the last token that it chose did not."""
    return output[:-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_however_a_text_is_generated(
    options: dict[str, Any], served: Any, routing: Any, seed: int
) -> None:
    prompt = random_ids(seed, 1, 4).repeat(1, 3)  # repeats itself, so that guesses come
    if "prefill_chunk_size" in options:
        options = {**options, "past_key_values": DynamicCache()}
    with served.moeinf.cache.record() as recorder:
        outputs = [served.generate(prompt, max_new_tokens=14, **{**GREEDY, **options})]
        if "past_key_values" in options:
            options = {**options, "past_key_values": DynamicCache()}
        outputs.append(served.generate(prompt[:, 1:], max_new_tokens=3, **{**GREEDY, **options}))
    trace = recorder.trace()
    texts = [(12, text_of(outputs[0][0])), (11, text_of(outputs[1][0]))]
    expect(trace, texts, routing)


def test_a_compiled_model(
    served: Any, routing: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Decode passes run without hooks, as `generate` compiles them on a GPU."""
    monkeypatch.setattr(type(served), "_valid_auto_compile_criteria", lambda *_: True)
    compiled = transformers.CompileConfig(backend="eager", mode=None)
    options = {"cache_implementation": "static", "compile_config": compiled, **GREEDY}
    prompt = random_ids(seed, 2, 5)
    with served.moeinf.cache.record() as recorder:
        output = served.generate(prompt, max_new_tokens=5, **options)
    expect(recorder.trace(), [(5, text_of(one)) for one in output], routing)
    torch.compiler.reset()


def test_an_assistant_has_a_trace_of_its_own(
    folder: Path, served: Any, routing: Any, tmp_path: Path, seed: int
) -> None:
    """A second served model guesses; both traces hold text alone."""
    drafts = moeinf.load(write_checkpoint(tmp_path, seed=3), slots=4)
    prompt = random_ids(seed, 1, 6)
    with served.moeinf.cache.record() as recorder, drafts.moeinf.cache.record() as draft_recorder:
        output = served.generate(prompt, max_new_tokens=12, assistant_model=drafts, **GREEDY)
    trace = recorder.trace()
    expect(trace, [(6, text_of(output[0]))], routing)
    assert len(draft_recorder.trace().split()) == 1
    with served.moeinf.cache.record() as recorder:  # it drafts for itself: all guesses are right
        output = served.generate(prompt, max_new_tokens=12, assistant_model=served, **GREEDY)
    parts = recorder.trace().split()
    assert len(parts) == 2
    texts = [part for part in parts if part.num_tokens >= 17]
    assert texts, "the text itself"


def test_a_batch_with_padding_and_rows_that_end_early(served: Any, routing: Any, seed: int) -> None:
    ids = random_ids(seed, 3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :2] = 0
    options = {"attention_mask": mask, **GREEDY}
    free = served.generate(ids, max_new_tokens=10, **options)[:, 9:]
    end = int(free[1, 3])  # row 1 ends here, or before
    with served.moeinf.cache.record() as recorder:
        served.generate(ids, max_new_tokens=10, eos_token_id=end, **options)
    texts = []
    for row in range(3):
        new = free[row].tolist()
        new = new[: new.index(end)] if end in new else new[:-1]
        prompt = ids[row][mask[row] == 1]
        texts.append((len(prompt), torch.cat([prompt, torch.tensor(new, dtype=torch.long)])))
    expect(recorder.trace(), texts, routing)


def test_padding_under_a_static_cache(served: Any, routing: Any, seed: int) -> None:
    """transformers gives the mask of a static cache in four dimensions."""
    ids = random_ids(seed, 2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "cache_implementation": "static", **GREEDY}
    with served.moeinf.cache.record() as recorder:
        output = served.generate(ids, max_new_tokens=5, **options)
    texts = [(4, text_of(output[0, 3:])), (7, text_of(output[1]))]
    expect(recorder.trace(), texts, routing)


def test_every_beam_is_a_sequence(served: Any, seed: int) -> None:
    for use_cache in (True, False):
        with served.moeinf.cache.record() as recorder:
            served.generate(
                random_ids(seed, 2, 5), num_beams=3, max_new_tokens=6,
                use_cache=use_cache, **GREEDY
            )  # fmt: skip
        parts = recorder.trace().split()
        assert [part.phase.tolist() for part in parts] == [[PREFILL] * 5 + [DECODE] * 5] * 6


def test_guidance_is_a_second_stream(served: Any, routing: Any, seed: int) -> None:
    prompt, negative = random_ids(seed, 1, 6), random_ids(seed + 1, 1, 9)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": negative, **GREEDY}
    with served.moeinf.cache.record() as recorder:
        output = served.generate(prompt, max_new_tokens=7, **options)
    new = output[0, 6:-1]
    texts = [(6, text_of(output[0])), (9, torch.cat([negative[0], new]))]
    expect(recorder.trace(), texts, routing)


def test_turns_of_one_conversation(served: Any, routing: Any, seed: int) -> None:
    ids = random_ids(seed, 1, 20)
    past = DynamicCache()
    with served.moeinf.cache.record() as recorder:
        first = served.generate(ids[:, :5], past_key_values=past, max_new_tokens=4, **GREEDY)
        both = torch.cat([first, ids[:, 5:9]], dim=1)
        # The first answer may hold the token that pads: without a mask it would not be seen.
        options = {**GREEDY, "attention_mask": torch.ones_like(both)}
        output = served.generate(both, past_key_values=past, max_new_tokens=4, **options)
    trace = recorder.trace()
    phases = [PREFILL] * 5 + [DECODE] * 3 + [PREFILL] * 5 + [DECODE] * 3
    assert trace.phase.tolist() == phases
    assert set(trace.sequence.tolist()) == {0}
    differ = np.sort(trace.experts, axis=-1) != routing(text_of(output[0]))
    assert differ.any((1, 2)).sum() <= 1


@pytest.mark.parametrize(
    "kind", ["by position", "by name", "returned", "static", "decoder", "none"]
)
def test_passes_without_generate(kind: str, served: Any, routing: Any, seed: int) -> None:
    """Two rows: a prompt, a second part of it, and two decode steps."""
    ids = random_ids(seed, 2, 10)
    model = served.model if kind == "decoder" else served
    names = ("cache", "past_key_values")
    past: Any = DynamicCache()
    if kind == "static":
        past = StaticCache(config=served.config, max_cache_len=16)
    with served.moeinf.cache.record() as recorder, torch.no_grad():
        for begin, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
            if kind == "none":
                model(ids[:, :end])
                continue
            if kind == "by position":
                model(ids[:, begin:end], None, None, past)
                continue
            given = {} if kind == "returned" and begin == 0 else {"past_key_values": past}
            output = model(ids[:, begin:end], use_cache=True, **given)
            if kind == "returned":
                past = next(getattr(output, name) for name in names if hasattr(output, name))
    expect(recorder.trace(), [(8, ids[0]), (8, ids[1])], routing)


def test_guesses_that_a_caller_takes_back(served: Any, routing: Any, seed: int) -> None:
    ids = random_ids(seed, 1, 8)
    past = DynamicCache()
    with served.moeinf.cache.record() as recorder, torch.no_grad():
        served(ids[:, :4], past_key_values=past)
        served(torch.cat([ids[:, 4:5], random_ids(seed + 1, 1, 3)], 1), past_key_values=past)
        past.crop(-3)
        served(ids[:, 5:6], past_key_values=past)
        served(ids[:, 6:7], past_key_values=past)
    trace = recorder.trace()
    assert trace.num_tokens == 7
    differ = np.sort(trace.experts, axis=-1) != routing(ids[0, :7])
    assert differ.any((1, 2)).sum() <= 1


def test_texts_packed_in_one_row(served: Any, routing: Any, seed: int) -> None:
    first, second = random_ids(seed, 5), random_ids(seed + 1, 3)
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    row = torch.cat([first, second])[None]
    with served.moeinf.cache.record() as recorder, torch.no_grad():
        served(row, position_ids=positions, use_cache=False)
    expect(recorder.trace(), [(5, first), (3, second)], routing)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="it asks for the memory of a GPU"
)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_continuous_batching(family: str, tmp_path: Path, seed: int) -> None:
    """Prompts of equal and of other lengths; sequences end at different times."""
    folder = write_checkpoint(tmp_path, family)
    served, routing = serve(folder), routing_of(folder)
    prompts = [random_ids(seed + i, n).tolist() for i, n in enumerate((6, 6, 11, 6, 3))]
    config = served.generation_config
    config.eos_token_id, config.max_new_tokens = random_ids(seed, 1).item(), 9
    with served.moeinf.cache.record() as recorder:
        outputs = served.generate_batch(prompts, generation_config=config, progress_bar=False)
    parts = recorder.trace().split()
    texts = []
    for i, prompt in enumerate(prompts):
        output = next(one for key, one in outputs.items() if key.endswith(f"_{i}"))
        text = [*prompt, *output.generated_tokens[:-1]]
        texts.append((len(prompt), torch.tensor(text)))
    # In order of their first pass, which the scheduler chooses.
    lengths = [(int((part.phase == PREFILL).sum()), part.num_tokens) for part in parts]
    assert sorted(lengths) == sorted((prompt, len(text)) for prompt, text in texts)
    for prompt, text in texts:
        expected = routing(text)
        alike = [
            (np.sort(part.experts, axis=-1) != expected).any((1, 2)).sum() <= 1
            for part, length in zip(parts, lengths, strict=True)
            if length == (prompt, len(text))
        ]
        assert any(alike)


def test_threads_keep_their_passes_apart(served: Any, routing: Any, seed: int) -> None:
    prompts = [random_ids(seed + i, 1, 5 + i) for i in range(3)]
    texts: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        texts[i] = text_of(served.generate(prompts[i], max_new_tokens=9, **GREEDY)[0])

    with served.moeinf.cache.record() as recorder:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    parts = recorder.trace().split()
    assert len(parts) == 3
    for part in parts:
        prompt = int((part.phase == PREFILL).sum())
        differ = np.sort(part.experts, axis=-1) != routing(texts[prompt - 5])
        assert differ.any((1, 2)).sum() <= 1


def test_recordings_within_one_another(served: Any, seed: int) -> None:
    cache = served.moeinf.cache
    ids = random_ids(seed, 2, 4)
    with torch.no_grad(), cache.record() as outer:
        served(ids)
        with cache.record() as inner:
            served(ids)
        served(ids)
    assert outer.trace().num_tokens == 24
    assert inner.trace().num_tokens == 8


@pytest.mark.parametrize("router", [False, True])
def test_autograd_and_defaults_of_torch_do_not_matter(
    router: bool, served: Any, routing: Any, seed: int
) -> None:
    ids = random_ids(seed, 1, 6)
    modes = [torch.enable_grad, torch.inference_mode, torch.no_grad, torch.enable_grad]
    before = torch.get_default_dtype()
    with served.moeinf.cache.record(router=router) as recorder:
        for mode in modes:
            with mode():
                served(ids)
        try:
            torch.set_default_dtype(torch.float64)
            served(ids)
        finally:
            torch.set_default_dtype(before)
    trace = recorder.trace()
    expect(trace, [(6, ids[0])] * 5, routing)
    assert trace.weights.dtype == np.float32


def test_a_pass_that_the_caller_describes(served: Any, seed: int) -> None:
    """Packed rows of which the model's inputs do not tell: the caller says what they are."""
    ids = random_ids(seed, 1, 6)
    cache = served.moeinf.cache
    said = moeinf.ForwardPass(
        prefill=True, sequences=[7, 7, 7, 8, 8, 8], positions=[0, 1, 2, 0, 1, -1]
    )
    with cache.record() as recorder, torch.no_grad():
        cache.begin_pass(said)
        served(ids)
        served(ids[:, :1])  # said of one pass alone
    assert recorder.trace().sequence.tolist() == [0, 0, 0, 1, 1, 2]


def test_a_run_that_is_abandoned(served: Any, routing: Any, seed: int) -> None:
    """An error in mid-pass, a generator left alone: what follows is right."""

    class Stop(Exception):
        pass

    passes = last = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == last:
            raise Stop

    prompt = random_ids(seed, 1, 5)
    layer = served.model.layers[1]
    for last in (1, 2, 4):  # noqa: B007 (fail() reads it)
        passes = 0
        hook = layer.register_forward_pre_hook(fail)
        with served.moeinf.cache.record() as recorder:
            with pytest.raises(Stop):
                served.generate(prompt, max_new_tokens=8, **GREEDY)
            hook.remove()
            output = served.generate(prompt, max_new_tokens=8, **GREEDY)
            with torch.no_grad():
                served(prompt[:, :1])
        parts = recorder.trace().split()
        whole = [part for part in parts if part.num_tokens == 12]
        assert len(whole) == 1
        assert whole[0].phase.tolist() == [PREFILL] * 5 + [DECODE] * 7
        differ = np.sort(whole[0].experts, axis=-1) != routing(text_of(output[0]))
        assert differ.any((1, 2)).sum() <= 1
        assert parts[-1].phase.tolist() == [PREFILL]


def test_experts_per_token_changed_while_recording(folder: Path, seed: int) -> None:
    model = moeinf.load(folder, slots=5)
    # Transformers 5.0 has the number of DeepSeek-V3 in the block, later versions in the router.
    every = ([m for m in layer.modules() if hasattr(m, "top_k")] for layer in model.model.layers)
    layers = [routers for routers in every if routers]
    assert layers

    def route_to(top_k: int, layers: list[list[Any]]) -> None:
        for router in itertools.chain(*layers):
            router.top_k = top_k

    ids = random_ids(seed, 1, 4)
    with model.moeinf.cache.record() as recorder, torch.no_grad():
        for top_k in (2, 1, 4):
            route_to(top_k, layers)
            model(ids)
        route_to(1, layers[:1])
        model(ids)
    trace = recorder.trace()
    used = (trace.experts >= 0).sum(-1)
    assert used[0:4].max() == used[0:4].min() == 2
    assert used[4:8].max() == used[4:8].min() == 1
    assert used[8:12].max() == used[8:12].min() == 4
    assert used[12:, 0].max() == 1 and used[12:, 1:].min() == 4
    assert trace.experts.shape[-1] == 4

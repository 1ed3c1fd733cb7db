"""Queries, keys and values in one call: the bits of the model's own attention, or its own code."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from scaled_weights import EVERY
from test_packed_linear import Case
from transformers import AutoConfig, AutoModel, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

import moeinf
from moeinf.experts.linear import MOST_OF_BF16, serve_linear
from moeinf.experts.packed_linear import make_packed
from moeinf.integrations.transformers import attention
from moeinf.integrations.transformers.attention import serve_attention
from moeinf.integrations.transformers.attention_forms import LAYERS
from moeinf.integrations.transformers.norms import serve_norms

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (torch.bfloat16, torch.float32)
HIDDEN = 256
SIZES = {
    "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 2, "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "intermediate_size": 8, "moe_intermediate_size": 8, "vocab_size": 9,
    "pad_token_id": 0, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "attention_bias": True, "max_position_embeddings": 1 << 18,
}  # fmt: skip
# Families, and what they have besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {}, "qwen3_moe": {}, "mixtral": {}, "olmoe": {}, "gpt_oss": {}, "phimoe": {},
    "minimax_m2": {"rotary_dim": 32}, "granitemoe": {},
    "hunyuan_v1_moe": {}, "solar_open": {}, "glm4_moe": {"use_qk_norm": True}, "hy_v3": {},
}  # fmt: skip
FORMATS = ("fp8-128x128-f32", "nvfp4", "int4-32-zeros", "gguf-q4_k", "gguf-q6_k")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call: did it compute?"""
    seen: list[bool] = []
    original = attention._inputs

    def counted(*given: Any) -> Any:
        made = original(*given)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(attention, "_inputs", counted)
    return seen


class Pair:
    """An attention as it was, and served; with the model's own turns of far positions."""

    def __init__(
        self,
        family: str,
        dtype: torch.dtype,
        seed: int,
        change: Callable[[Any], None] = lambda module: None,
        **sizes: Any,
    ):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {family}")
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **sizes})
        model: Any = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.dtype, self.config = dtype, model.config
        self.rotary = model.rotary_emb
        self.plain = next(one for one in model.modules() if hasattr(one, "q_proj"))
        for name, parameter in self.plain.named_parameters():
            parameter.normal_(std=0.3 if name.endswith("proj.weight") else 1)
        change(self.plain)
        serve_linear(self.plain)
        serve_norms(self.plain)
        self.served = copy.deepcopy(self.plain)
        serve_attention(torch.nn.Sequential(self.served))
        self.cache_name = next(
            name for name in ("cache", "past_key_values") if name in signature(self.plain)
        )

    def given(self, batch: int, tokens: int) -> tuple[torch.Tensor, Any]:
        hidden = torch.randn(batch, tokens, HIDDEN).to(self.dtype) * random.choice([0.1, 1, 30])
        first = torch.randint(0, 200_000, (random.choice([1, batch]), 1))
        return hidden, self.rotary(hidden, first + torch.arange(tokens))

    def run(self, module: Any, *given: Any, **named: Any) -> Any:
        with torch.no_grad():
            hidden, turns = given
            return module(
                hidden_states=hidden, position_embeddings=turns, attention_mask=None, **named
            )[0]

    def check(self, batch: int = 1, tokens: int = 1, times: int = 1, **named: Any) -> None:
        """With and without a cache of earlier tokens."""
        caches = [DynamicCache(config=self.config) for _ in range(2)]
        for _ in range(times):
            given = self.given(batch, tokens)
            same(self.run(self.served, *given, **named), self.run(self.plain, *given, **named))
            found, expected = (
                self.run(module, *given, **{self.cache_name: cache}, **named)
                for module, cache in zip((self.served, self.plain), caches, strict=True)
            )
            same(found, expected)
        index = self.plain.layer_idx
        for name in ("keys", "values"):
            same(*(getattr(cache.layers[index], name) for cache in caches))


def signature(module: Any) -> Any:
    return inspect.signature(type(module).forward).parameters


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & (found == found), expected.signbit() & (found == found))


def is_served(module: Any) -> bool:
    return hasattr(module, "moeinf_attention")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_of_the_model(seed: int, calls: Any, family: str, dtype: Any) -> None:
    random.seed(seed)
    pair = Pair(family, dtype, seed)
    calls.clear()
    kind = type(pair.plain)
    assert is_served(pair.served) and isinstance(pair.served, kind)
    assert type(pair.served).__name__ == kind.__name__
    assert pair.served.state_dict().keys() == pair.plain.state_dict().keys()
    most = MOST_OF_BF16 if dtype == torch.bfloat16 else 16
    for batch, tokens in itertools.product(range(1, 5), range(1, 5)):
        calls.clear()
        pair.check(batch, tokens, times=2)
        outside = pair.served.moeinf_attention[-1] and tokens > 1
        assert calls == [batch * tokens <= most and not outside] * 4, (batch, tokens)


def test_turns_of_another_type_than_the_tokens_are_the_models_own(seed: int, calls: Any) -> None:
    random.seed(seed)
    pair = Pair("flex_olmo", torch.bfloat16, seed)
    calls.clear()
    assert is_served(pair.served)
    pair.check(2, 2)
    assert calls and not any(calls)


@pytest.mark.parametrize("normed", [False, True])
def test_norms_by_configuration(seed: int, calls: Any, normed: bool) -> None:
    random.seed(seed)
    pair = Pair("glm4_moe", torch.float32, seed, use_qk_norm=normed)
    calls.clear()
    pair.check()
    assert all(calls)
    if normed:
        pair.plain.use_qk_norm = pair.served.use_qk_norm = False
        pair.check()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_packed_projections_of_several_formats(
    seed: int, calls: Any, dtype: torch.dtype, biased: bool
) -> None:
    rng = random.Random(seed)
    random.seed(seed)

    def pack(module: Any) -> None:
        for name in rng.sample(LAYERS, rng.choice([1, 2, 3])):
            layer = getattr(module, name)
            case = Case(EVERY[rng.choice(FORMATS)], layer.out_features, HIDDEN, rng.randrange(99))
            make_packed(layer, case.form, case.packed.clone(), dtype)

    for family in ("qwen3_moe", "qwen2_moe"):
        options = {"qkv_bias": biased} if family == "qwen2_moe" else {"attention_bias": biased}
        pair = Pair(family, dtype, seed, pack, **options)
        assert is_served(pair.served)
        for batch, tokens in ((1, 1), (1, 4), (3, 1)):
            pair.check(batch, tokens)
    assert any(calls)


def test_threads_do_not_change_a_bit(seed: int) -> None:
    from moeinf import _core

    pair = Pair("qwen3_moe", torch.float32, seed, head_dim=96)
    hidden, turns = pair.given(1, 3)
    form = attention._form(*pair.served.moeinf_attention)
    expected = attention._inputs(form, pair.served, hidden, *turns)
    for threads in (1, 2, 5):
        engine = _core.CpuEngine(threads=threads)
        found = _core.attention_inputs(engine, form, pair.served, hidden, *turns, 16, 16)
        assert all(map(torch.equal, found, expected))


def hook_of(module: Any) -> Any:
    return module.register_forward_hook(lambda module, given, result: 2 * result)


def changes() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Changes after which a part is no longer what it was."""
    yield "hook on a projection", lambda module: hook_of(module.k_proj)
    yield "hook on a norm", lambda module: hook_of(module.q_norm)
    yield (
        "hook before a projection",
        lambda module: module.v_proj.register_forward_pre_hook(lambda _, given: (-given[0],)),
    )
    yield "wrapped", lambda module: setattr(module, "q_proj", torch.nn.Sequential(module.q_proj))
    yield "another class", lambda module: setattr(module, "q_proj", torch.nn.Linear(HIDDEN, 256))

    def own_forward(module: Any) -> None:
        before = module.v_proj.forward
        module.v_proj.forward = lambda x: before(x) + 1

    yield "a forward of its own", own_forward

    def parametrised(module: Any) -> None:
        torch.nn.utils.parametrize.register_parametrization(
            module.k_proj, "weight", torch.nn.Tanh()
        )

    yield "parametrised", parametrised


@pytest.mark.parametrize("name, change", [*changes()])
def test_what_was_changed_runs_as_the_models_own(
    seed: int, calls: Any, name: str, change: Callable[[Any], Any]
) -> None:
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.float32, seed)
    calls.clear()
    torch.manual_seed(seed)
    for module in (pair.plain, pair.served):
        torch.manual_seed(seed)
        change(module)
    pair.check(2, 2)
    assert calls and not any(calls)


def test_hooks_come_and_go(seed: int, calls: Any) -> None:
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.float32, seed)
    calls.clear()
    handles = [hook_of(module.v_proj) for module in (pair.plain, pair.served)]
    pair.check()
    for handle in handles:
        handle.remove()
    assert not any(calls)
    pair.check()
    assert any(calls)
    calls.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, result: 2 * result if isinstance(result, torch.Tensor) else None
    )
    pair.check()
    handle.remove()
    assert not calls
    seen = []
    handle = pair.served.register_forward_hook(lambda *_: seen.append(1))  # of the whole
    pair.check()
    handle.remove()
    assert seen and any(calls)


def test_changed_weights_are_used(seed: int, calls: Any) -> None:
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.bfloat16, seed)
    calls.clear()
    modules = (pair.plain, pair.served)
    other = {name: torch.randn_like(one) for name, one in pair.plain.state_dict().items()}
    for module in modules:
        module.load_state_dict(other)
    pair.check()
    for module in modules:
        module.q_proj.weight.mul_(-2)
        module.k_norm.weight.add_(1)
    pair.check()
    for module in modules:
        module.load_state_dict({name: -one for name, one in other.items()}, assign=True)
        module.v_proj.bias = None
        module.q_norm.variance_epsilon = 0.5
    pair.check()
    assert all(calls)


@pytest.mark.parametrize("loaded", TYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2", "gpt_oss"])
def test_casts_and_copies(seed: int, family: str, loaded: torch.dtype) -> None:
    random.seed(seed)
    pair = Pair(family, loaded, seed)
    for dtype in (torch.float16, torch.float64, *TYPES):
        pair.plain, pair.served = pair.plain.to(dtype), copy.deepcopy(pair.served).to(dtype)
        pair.dtype = dtype
        pair.check(1, 2)
        pair.check()
    given = pair.given(1, 1)
    turns = tuple(one.double() for one in given[1])  # of another type than the tokens
    for module in (pair.plain, pair.served):
        module.double()
    same(*(pair.run(one, given[0].double(), turns) for one in (pair.served, pair.plain)))


def test_gradients_autocast_and_compilation(seed: int, calls: Any) -> None:
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.float32, seed)
    calls.clear()
    modules = (pair.plain, pair.served)
    hidden, turns = pair.given(1, 3)
    grads = []
    for module in modules:
        module.train().requires_grad_(True)
        given = hidden.clone().requires_grad_()
        module(given, turns, None)[0].square().sum().backward()
        grads.append((given.grad, module.q_proj.weight.grad, module.k_norm.weight.grad))
        module.eval().requires_grad_(False)
    assert all(map(torch.equal, *grads))
    with torch.autocast("cpu", torch.bfloat16):
        same(*(pair.run(module, hidden, turns) for module in modules))
    compiled = torch.compile(pair.served, fullgraph=True, backend="aot_eager")
    same(*(pair.run(module, hidden, turns) for module in (compiled, pair.plain)))
    assert not calls
    dropout = [copy.deepcopy(module).train() for module in modules]  # without gradients
    found = []
    for module in dropout:
        torch.manual_seed(seed)
        module.attention_dropout = 0.5
        found.append(pair.run(module, hidden, turns))
    same(*found)
    assert calls == [True]


def test_what_does_not_fit_is_left_to_the_model(seed: int, calls: Any) -> None:
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.float32, seed)
    calls.clear()
    hidden, turns = pair.given(2, 2)
    wide = torch.randn(2, 2, 2 * HIDDEN)[..., ::2]
    half = tuple(one.bfloat16() for one in turns)
    for given in (
        (wide, turns),
        (hidden, half),
        (torch.randn(1, 17, HIDDEN), pair.given(1, 17)[1]),
        (hidden, [*turns]),
        (hidden.as_subclass(type("Own", (torch.Tensor,), {})), turns),
    ):
        same(pair.run(pair.served, *given), pair.run(pair.plain, *given))
    assert not any(calls)
    with torch.no_grad(), pytest.raises(RuntimeError):  # as the model's own
        pair.served(torch.randn(1, 1, HIDDEN - 1), turns, None)


def test_the_older_name_of_the_cache(seed: int) -> None:
    """transformers from 5.24 on takes both names, and warns of one."""
    random.seed(seed)
    pair = Pair("qwen3_moe", torch.float32, seed)
    caches = [DynamicCache(config=pair.config) for _ in range(2)]
    given = pair.given(1, 1)
    for module, cache in zip((pair.served, pair.plain), caches, strict=True):
        pair.run(module, *given, past_key_values=cache)
    assert all(cache.get_seq_length() == 1 for cache in caches)


def test_a_clip_that_is_set_later(seed: int) -> None:
    random.seed(seed)
    pair = Pair("olmoe", torch.float32, seed)
    pair.check()
    pair.plain.config.clip_qkv = pair.served.config.clip_qkv = 0.25
    pair.check()


class Other(Qwen3MoeAttention):
    """Scales its queries: another forward, by other statements."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):  # type: ignore[no-untyped-def, override]
        return super().forward(2 * hidden_states, position_embeddings, attention_mask, **kwargs)


def test_attentions_of_other_forms_are_left_alone(seed: int) -> None:
    plain = Pair("qwen3_moe", torch.float32, seed).plain
    other = copy.deepcopy(plain)
    other.__class__ = Other
    hooked = copy.deepcopy(plain)
    hooked.q_norm = torch.nn.RMSNorm(64)
    unserved = copy.deepcopy(plain)
    unserved.v_proj.__class__ = torch.nn.Linear
    odd = Pair("qwen3_moe", torch.float16, seed).plain
    for module in (other, hooked, unserved, odd):
        serve_attention(torch.nn.Sequential(module))
        assert not is_served(module)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_loaded_model_gives_the_same_tokens_without(
    tmp_path: Path, seed: int, calls: Any, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    torch_only = moeinf.load(folder, dtype=dtype, linear="torch")
    assert not any(is_served(one) for one in torch_only.modules())
    model = moeinf.load(folder, dtype=dtype)
    served = [one for one in model.modules() if is_served(one)]
    assert len(served) == COMMON["num_hidden_layers"]
    torch.manual_seed(seed)
    prompt = torch.randint(0, COMMON["vocab_size"], (2, 5))
    found = []
    for side in ("served", "plain"):
        if side == "plain":
            for one in served:
                one.__class__ = type(one).__mro__[2]
        calls.clear()
        out = model.generate(
            prompt, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found.append(torch.stack(out.logits))
        assert any(calls) == (side == "served")
    same(*found)

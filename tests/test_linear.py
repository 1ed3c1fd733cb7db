"""`moeinf.linear`: torch's linear for a few tokens, on the kernels and threads of the experts."""

from __future__ import annotations

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from torch.nn.functional import linear as torch_linear
from torch.utils._python_dispatch import TorchDispatchMode

import moeinf
from moeinf import _core
from moeinf.experts import linear as ours
from moeinf.experts.checks import DTYPES

ISAS = [name for name, supported in _core.cpu_kernels() if supported]
MOST = _core.LINEAR_TOKENS
# Largest error over the sum of absolute terms: of 32-bit sums, and of the result's own rounding.
SUMS = 2**-20
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}


@pytest.fixture(scope="module", params=ISAS)
def engine(request: pytest.FixtureRequest) -> _core.CpuEngine:
    return _core.CpuEngine(threads=2, kernels=request.param)


def raw(engine, x, weight, bias=None) -> torch.Tensor:
    """The C++ function; rows of x and of weight may have gaps between them."""
    out = torch.full((x.shape[0], weight.shape[0]), math.nan, dtype=x.dtype)
    found = _core.linear(engine, x, weight, bias, out, len(x), len(x))
    assert found is out
    return out


def with_gaps(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, with `gap` columns of NaN behind each."""
    wide = torch.full((len(tensor), tensor.shape[1] + gap), math.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def random_case(rng: random.Random, tokens: int, rows: int, cols: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return (
        torch.randn(tokens, cols, generator=generator).to(dtype),
        torch.randn(rows, cols, generator=generator).to(dtype),
        torch.randn(rows, generator=generator).to(dtype),
    )


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
    """Against float64, each result by the size of its own terms."""
    expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    error = (found.double() - expected).abs()
    least = torch.finfo(x.dtype).tiny * ROUNDING[x.dtype]  # a subnormal result is rounded to this
    assert bool((error <= SUMS * size + ROUNDING[x.dtype] * expected.abs() + least).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_float64_reference(engine, seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    for tokens in range(1, MOST + 1):
        rows = rng.choice([1, 3, 12, 47, 128, 700, rng.randint(1, 1500)])
        cols = rng.choice([1, 2, 31, 64, 353, rng.randint(1, 900)])
        x, weight, bias = random_case(rng, tokens, rows, cols, dtype)
        x, weight = with_gaps(x, rng.choice([0, 5])), with_gaps(weight, rng.choice([0, 3, cols]))
        added = rng.choice([None, bias])
        check(raw(engine, x, weight, added), x, weight, added)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_tokens(engine, seed: int, dtype) -> None:
    rng = random.Random(seed)
    x, weight, bias = random_case(rng, MOST, rng.randint(400, 900), rng.randint(300, 700), dtype)
    together = raw(engine, x, weight, bias)
    for threads in (1, 3, 7):
        other = _core.CpuEngine(threads=threads, kernels=engine.kernels)
        assert torch.equal(raw(other, x, weight, bias), together), threads
        for count in (1, 2, 5):
            part = x[count : 2 * count]
            assert torch.equal(raw(other, part, weight, bias), together[count : 2 * count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_own_token_or_output(engine, seed: int, dtype) -> None:
    rng = random.Random(seed)
    tokens, rows, cols = rng.randint(2, MOST), rng.randint(2, 99), rng.randint(2, 99)
    x, weight, _ = random_case(rng, tokens, rows, cols, dtype)
    expected = torch.zeros(tokens, rows, dtype=torch.bool)
    token, row = rng.randrange(tokens), rng.randrange(rows)
    x[token, rng.randrange(cols)] = math.nan
    weight[row, rng.randrange(cols)] = math.nan
    expected[token] = expected[:, row] = True
    assert torch.equal(raw(engine, x, weight).isnan(), expected)
    weight[row] = math.inf
    assert not raw(engine, x, weight)[:, row].isfinite().any()


def test_the_core_refuses_calls_that_make_no_sense() -> None:
    engine = _core.CpuEngine(threads=1)
    x, weight = torch.zeros(MOST + 1, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=f"expected 0 to {MOST} tokens, got {MOST + 1}"):
        raw(engine, x, weight)
    for call in (
        (x[:1], weight[:1].expand(4, 8), None),
        (x[:1, :7], weight, None),
        (x[:0], weight, None),
        (x[:3], weight, None),
        (x[:1].bfloat16(), weight, None),
        (x[:1], weight, torch.zeros(3)),
        (x[:1], weight, torch.zeros(8)[::2]),
        (x[:1].to("meta"), weight, None),
        (x[:1], weight[0], None),
    ):
        assert _core.linear(engine, *call, None, 2, 2) is None
    assert _core.linear(engine, x[:2], weight, None, None, 2, 2).shape == (2, 4)


class Seen(TorchDispatchMode):
    """Which operators run inside."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))


def cases_for_torch() -> dict[str, tuple[torch.Tensor, ...]]:
    """What the kernels do not take; torch decides what comes of it."""
    x, weight = torch.randn(2, 6), torch.randn(5, 6)
    return {
        "many tokens": (torch.randn(MOST + 1, 6), weight),
        "float64": (x.double(), weight.double()),
        "no tokens": (torch.randn(0, 6), weight),
        "no tokens, 3 dimensions": (torch.randn(2, 0, 6), weight),
        "no columns": (torch.randn(2, 0), torch.randn(5, 0)),
        "no rows": (x, torch.randn(0, 6)),
        "transposed weight": (x, torch.randn(6, 5).T),
        "every second column": (x, torch.randn(5, 12)[:, ::2]),
        "one row for all": (x, torch.randn(1, 6).expand(5, 6)),
        "one number for a bias": (x, weight, torch.randn(1)),
        "a vector for a weight": (x, torch.randn(6)),
    }


@pytest.mark.parametrize("name", cases_for_torch())
def test_whatever_the_kernels_do_not_take_goes_to_torch(name: str) -> None:
    case = cases_for_torch()[name]
    with torch.no_grad():
        assert torch.equal(moeinf.linear(*case), torch_linear(*case))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 2, 6), (1, 1, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_strides_of_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, bias = with_gaps(torch.randn(5, 6).to(dtype), 3), torch.randn(10).to(dtype)[::2]
    wide = torch.randn(*shape[:-1], 12).to(dtype)
    for x in (wide[..., :6], wide[..., ::2], torch.randn(6, *shape[:-1]).to(dtype).movedim(0, -1)):
        with torch.inference_mode(), Seen() as seen:
            found = moeinf.linear(x, weight, bias)
        assert "moeinf.linear.default" in seen.names and found.shape == (*shape[:-1], 5)
        check(found.reshape(-1, 5), x.reshape(-1, 6), weight, bias)


def test_wrong_shapes_and_dtypes_fail_as_in_torch() -> None:
    x, weight = torch.randn(2, 6), torch.randn(5, 7)
    for case in ((x, weight), (x, weight[:, :6].double()), (torch.randn(()), weight)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            moeinf.linear(*case)


def test_gradients_are_those_of_torch() -> None:
    for wanted in itertools.product([False, True], repeat=3):
        found = []
        torch.manual_seed(1)
        inputs = [torch.randn(3, 6), torch.randn(5, 6), torch.randn(5)]
        for function in (moeinf.linear, torch_linear):
            leaves = [
                one.clone().requires_grad_(grad) for one, grad in zip(inputs, wanted, strict=True)
            ]
            y = function(*leaves)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.square().sum().backward()
            found.append([one.grad for one in leaves])
        for mine, theirs in zip(*found, strict=True):
            if theirs is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, theirs)


def test_transforms_of_functions_work_as_in_torch() -> None:
    x, weight = torch.randn(4, 3, 6), torch.randn(5, 6)
    for function in (moeinf.linear, torch_linear):
        assert torch.equal(
            torch.func.vmap(function, (0, None))(x, weight),
            torch.func.vmap(torch_linear, (0, None))(x, weight),
        )
        _, tangent = torch.func.jvp(lambda w, f=function: f(x, w), (weight,), (weight,))
        torch.testing.assert_close(tangent, torch_linear(x, weight))


def test_autocast_rounds_as_in_torch() -> None:
    x, weight = torch.randn(2, 6), torch.randn(5, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = moeinf.linear(x, weight), torch_linear(x, weight)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_it_traces_and_compiles_whole() -> None:
    x, weight, bias = torch.randn(2, 6), torch.randn(5, 6), torch.randn(5)
    torch.library.opcheck(torch.ops.moeinf.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.moeinf.linear.default, (x, weight.requires_grad_(), None))
    compiled = torch.compile(moeinf.linear, fullgraph=True, backend="aot_eager")
    for tokens in (1, 2, 3, MOST + 5):
        more = torch.randn(tokens, 6)
        with torch.no_grad():
            assert torch.equal(compiled(more, weight, bias), moeinf.linear(more, weight, bias))
    meta = moeinf.linear(x.to("meta"), weight.to("meta"))
    assert meta.shape == (2, 5) and meta.is_meta


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("linear"))


def random_prompt(seed: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], (1, length), generator=generator)


def logits_of(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [one for one in model.modules() if isinstance(one, torch.nn.Linear)]


def test_a_loaded_model_keeps_its_classes_and_parameters(folder: Path, seed: int) -> None:
    served, plain = moeinf.load(folder), moeinf.load(folder, linear="torch")
    assert all(type(one) is ours.Linear for one in linears(served)) and linears(served)
    assert all(type(one) is torch.nn.Linear for one in linears(plain))
    assert served.state_dict().keys() == plain.state_dict().keys()
    assert repr(served) == repr(plain)
    for length in (1, 5, MOST + 4):
        prompt = random_prompt(seed, length)
        torch.testing.assert_close(
            logits_of(served, prompt), logits_of(plain, prompt), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="linear='fast': expected one of auto, torch"):
        moeinf.load(folder, linear="fast")


def test_layers_that_are_changed_after_loading_stay_right(folder: Path, seed: int) -> None:
    """Moved to another dtype, hooked, parametrised, copied: each call looks at its tensors."""
    model = moeinf.load(folder)
    layer = linears(model)[0]
    x = torch.randn(2, layer.in_features)

    def agrees(one: torch.nn.Module = layer, x: torch.Tensor = x) -> bool:
        with torch.inference_mode():
            check(one(x), x, one.weight, one.bias)
        return True

    assert agrees()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert agrees(twin) and agrees()
    layer.weight = torch.nn.Parameter(torch.randn(layer.out_features, layer.in_features))
    assert agrees()
    seen = []
    hook = layer.register_forward_hook(lambda module, given, result: seen.append(result) or 0 * x)
    with torch.inference_mode():
        assert torch.equal(layer(x), 0 * x) and len(seen) == 1
    hook.remove()
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    assert agrees()
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        if dtype != torch.float64:
            assert agrees(layer, x.to(dtype))
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(2, layer.in_features, dtype=torch.float32))
    layer.to("meta")
    assert layer(x.half().to("meta")).is_meta


class Doubling(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_subclasses_are_left_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), Doubling(5, 4))
    ours.serve_linear(model)
    assert type(model[0]) is ours.Linear and type(model[1]) is Doubling


class Marked(torch.Tensor):
    """A weight of a type of its own, as quantisers make them: its linear is not torch's."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch_linear:
            return torch.full((len(args[0]), 5), 7.0)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_another_type_keeps_its_own_product() -> None:
    layer = torch.nn.Linear(6, 5, bias=False)
    ours.serve_linear(layer)
    layer.weight = torch.nn.Parameter(torch.randn(5, 6).as_subclass(Marked), requires_grad=False)
    with torch.inference_mode():
        assert torch.equal(layer(torch.randn(2, 6)), torch.full((2, 5), 7.0))


def test_output_does_not_depend_on_the_budget(folder: Path, seed: int) -> None:
    for length in (1, 3, MOST + 3):
        prompt = random_prompt(seed, length)
        expected = logits_of(moeinf.load(folder), prompt)
        for slots, policy in ((1, "lru"), (5, "learned")):
            served = moeinf.load(folder, slots=slots, policy=policy)
            assert torch.equal(logits_of(served, prompt), expected)

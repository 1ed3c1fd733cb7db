"""Linear layers of packed weights: the operator in every format, the layer, and loaded models."""

from __future__ import annotations

import copy
import io
import math
import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import write_checkpoint
from scaled_weights import EVERY, fill, whole
from torch.nn.functional import linear as torch_linear

import moeinf
from moeinf import _core
from moeinf.checkpoint.formats import FORMATS, WeightFormat
from moeinf.errors import UnsupportedError
from moeinf.experts import packed_linear as packed
from moeinf.experts.checks import DTYPES

MOST = _core.LINEAR_TOKENS
ISAS = [name for name, supported in _core.cpu_kernels() if supported]
# Largest error over the sum of absolute terms: of 32-bit sums, of a decoded weight's rounding (a
# weight has at most three products), and of the result's own.
SUMS = 2**-19
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}


class Case:
    """A random matrix: its packed bytes, with NaN of every kind around, and its numbers."""

    def __init__(self, row: WeightFormat, rows: int, cols: int, seed: int):
        self.form = packed.packed_form(row, rows, cols)
        self.generator = torch.Generator().manual_seed(seed)
        around = torch.full((self.form.nbytes + 512,), 255, dtype=torch.uint8)
        self.packed = around[256:-256]
        view = self.form.matrix.view(self.packed[None])
        self.numbers = fill(view, row, 0, self.generator)

    def draw(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def check(self, found: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Against float64, each result by the size of its own terms."""
        dtype = found.dtype
        expected = x.double() @ self.numbers.T
        size = x.double().abs() @ self.numbers.abs().T
        if bias is not None:
            expected, size = expected + bias.double(), size + bias.double().abs()
        weights = 0.0 if len(x) <= MOST else ROUNDING[dtype]
        # Codes of blocks are differences of larger numbers, which are rounded to 32 bits.
        sums = 8 * SUMS if self.form.row.unit > 1 else SUMS
        least = torch.finfo(dtype).tiny
        error = (found.double() - expected).abs()
        assert bool(
            (error <= (sums + weights) * size + ROUNDING[dtype] * expected.abs() + least).all()
        )


def raw(engine: _core.CpuEngine, case: Case, x: torch.Tensor, bias: Any) -> torch.Tensor:
    out = torch.full((len(x), case.form.rows), math.nan, dtype=x.dtype)
    assert _core.packed_linear(engine, x, case.form.core, case.packed, bias, out) is out
    return out


@pytest.mark.parametrize("kernels", ISAS)
@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_every_format_on_every_instruction_set(seed: int, row: WeightFormat, kernels: str) -> None:
    """The kernels against float64; bits that depend neither on threads nor on other tokens; and
    the decoder against the reference row."""
    rng = random.Random(seed)
    engine, other = (_core.CpuEngine(threads=n, kernels=kernels) for n in (2, 3))
    for dtype in DTYPES:
        rows, cols = rng.choice([1, 13, 160]), whole(row, 2 * rng.choice([32, 176, 353]))
        case = Case(row, rows, cols, rng.randrange(2**31))
        bias = rng.choice([None, case.draw(rows, dtype=dtype)])
        x = case.draw(MOST, cols, dtype=dtype)
        together = raw(engine, case, x, bias)
        case.check(together, x, bias)
        for first, count in ((0, 1), (3, 4)):
            part = x[first : first + count].clone()
            assert torch.equal(raw(other, case, part, bias), together[first : first + count])
        first = rng.randrange(rows)
        found = torch.full((rows - first, cols), math.nan, dtype=dtype)
        _core.decode(
            engine, DTYPES[dtype], case.form.core, case.packed.data_ptr(), first, rows - first,
            found.data_ptr(),
        )  # fmt: skip
        wanted = case.numbers[first:]
        around = wanted.abs().amax(1, keepdim=True) if row.unit > 1 else wanted.abs()
        least = torch.finfo(dtype).tiny
        assert bool(((found - wanted).abs() <= ROUNDING[dtype] * around + least).all())


@pytest.mark.parametrize("name", ["fp8-128x128-f32", "nvfp4", "int4-32-zeros", "gguf-q4_k"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_few_tokens_and_many(seed: int, monkeypatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packed, "PANEL_BYTES", 50_000)
    case = Case(EVERY[name], 200, 512, seed)
    for shape in ((), (1,), (2, 3), (MOST + 1,), (0,), (2, 0), (2, 40)):
        x = case.draw(*shape, 512, dtype=torch.float32).to(dtype)
        bias = random.Random(seed).choice([None, case.draw(200, dtype=dtype)])
        with torch.no_grad():
            found = packed.packed_linear(x, case.packed, bias, case.form)
        assert found.shape == (*shape, 200) and found.dtype == dtype
        if dtype == torch.float64:
            expected = torch_linear(x, case.numbers, bias)
            torch.testing.assert_close(found, expected)
        else:
            case.check(found.reshape(-1, 200), x.reshape(-1, 512), bias)
    strided = case.draw(3, 1024, dtype=torch.float32).to(dtype)[:, ::2]
    with torch.no_grad():
        assert torch.equal(
            packed.packed_linear(strided, case.packed, None, case.form),
            packed.packed_linear(strided.contiguous(), case.packed, None, case.form),
        )


def test_what_does_not_fit_is_refused(seed: int) -> None:
    case = Case(EVERY["mxfp4"], 8, 64, seed)
    bias = torch.zeros(8)
    for x, added in (
        (torch.zeros(2, 63), None),
        (torch.zeros(()), None),
        (torch.zeros(2, 64, dtype=torch.bfloat16), bias),
        (torch.zeros(2, 64), bias[:7]),
        (torch.zeros(20, 64), bias[:7]),
        (torch.zeros(2, 64, dtype=torch.int32), None),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError):
            packed.packed_linear(x, case.packed, added, case.form)
    with pytest.raises(ValueError, match="linear: weight: a row of q4_k needs a multiple of 256"):
        _core.LinearWeight(_core.Matrix(format="q4_k", rows=2, cols=32, values=_core.Rows(0, 18)))
    with pytest.raises(ValueError, match="linear: weight scales: expected blocks of"):
        packed.packed_form(FORMATS["e4m3"].with_scales("f32", (1, 48)), 4, 96)
    with pytest.raises(ValueError, match="rows 3 to 9 of 8"):
        case.form.decode(case.packed, torch.float32, 3, 6)


def test_gradients_are_those_of_the_decoded_weight(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(packed, "PANEL_BYTES", 50_000)
    case = Case(EVERY["nvfp4"], 150, 512, seed)
    weight = case.numbers.float()
    for tokens in (3, MOST + 9):
        found = []
        for function in (
            lambda x, b: packed.packed_linear(x, case.packed, b, case.form),
            lambda x, b: torch_linear(x, weight, b),
        ):
            case.generator.manual_seed(seed)
            x = case.draw(2, tokens, 512, dtype=torch.float32).requires_grad_()
            bias = case.draw(150, dtype=torch.float32).requires_grad_()
            y = function(x, bias)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, bias.grad))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())
            )
    x = case.draw(4, 3, 512, dtype=torch.float32)
    mapped = torch.func.vmap(lambda one: packed.packed_linear(one, case.packed, None, case.form))
    torch.testing.assert_close(mapped(x), torch_linear(x, weight), rtol=1e-4, atol=1e-4)


def test_it_traces_compiles_and_follows_autocast(seed: int) -> None:
    case = Case(EVERY["int8-64"], 24, 128, seed)
    x, bias = case.draw(3, 128, dtype=torch.float32), case.draw(24, dtype=torch.float32)
    arguments = (x, case.packed.clone(), bias, case.form.name)
    torch.library.opcheck(torch.ops.moeinf.packed_linear.default, arguments)
    compiled = torch.compile(
        lambda one: packed.packed_linear(one, case.packed, bias, case.form),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for tokens in (1, 3, MOST + 5):
        x = case.draw(tokens, 128, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(compiled(x), packed.packed_linear(x, case.packed, bias, case.form))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed.packed_linear(x, case.packed, bias, case.form).dtype == torch.bfloat16


@pytest.fixture
def case(seed: int) -> Case:
    return Case(EVERY["mxfp4"], 40, 96, seed)


@pytest.fixture
def layer(case: Case) -> torch.nn.Linear:
    layer = torch.nn.Linear(96, 40)
    packed.make_packed(layer, case.form, case.packed.clone(), torch.float32)
    return layer


def test_a_layer_is_moved_cast_and_copied(case: Case, layer: torch.nn.Linear) -> None:
    assert isinstance(layer, torch.nn.Linear) and "e2m1 e8m0 1x32 [40, 96]" in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    twins = [copy.deepcopy(layer)]
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        twins.append(copy.deepcopy(layer).to(dtype))
        assert torch.equal(twins[-1].packed, case.packed)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        x = case.draw(5, 96, dtype=torch.float32).to(twin.bias.dtype)
        assert twin.weight.dtype == x.dtype and twin.weight.shape == (40, 96)
        with torch.no_grad():
            found = twin.train()(x)
            if x.dtype != torch.float64:
                case.check(found, x, twin.bias)
    layer.to("meta")
    assert layer(torch.zeros(2, 96, device="meta")).shape == (2, 40)


def test_its_weight_is_read_and_never_written(case: Case, layer: torch.nn.Linear) -> None:
    weight = layer.weight
    assert torch.equal(weight.double(), case.numbers) and type(weight + 1) is torch.Tensor
    assert torch.equal(torch_linear(torch.eye(96), weight), case.numbers.float().T)

    def set_data(one: torch.Tensor) -> None:
        one.data = torch.zeros(40, 96)

    def set_item(one: torch.Tensor) -> None:
        one[0] = 0

    def add_to(one: torch.Tensor) -> None:
        one += 1

    for change in (
        torch.nn.init.zeros_, set_data, set_item, add_to,
        lambda one: one.data.add_(1), lambda one: add_to(one.detach()),
        lambda one: one[0].mul_(2), lambda one: one.T.copy_(one.T),
        lambda one: torch.add(one, 1, out=one), lambda one: one.view(-1).zero_(),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(UnsupportedError, match="load the model with dense="):
            change(layer.weight)
    for value in (torch.nn.Parameter(torch.zeros(40, 96)), torch.zeros(40, 96)):
        with pytest.raises(UnsupportedError, match="weight: the weight of this layer stays packed"):
            layer.weight = value
    with pytest.raises(UnsupportedError):
        layer.reset_parameters()
    assert torch.equal(layer.weight.double(), case.numbers)


def test_its_state_dict_has_the_decoded_weight(case: Case, layer: torch.nn.Linear) -> None:
    state = layer.state_dict()
    assert [*state] == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert type(read["weight"]) is torch.Tensor
    ordinary = torch.nn.Linear(96, 40)
    ordinary.load_state_dict(read)
    assert torch.equal(ordinary.weight.double(), case.numbers)
    layer.load_state_dict(read)
    other = {**read, "weight": read["weight"] + 1}
    with pytest.raises(UnsupportedError, match="weight: the weight of this layer stays packed"):
        layer.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": read["bias"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        layer.load_state_dict({**read, "scale": torch.ones(1)})


def test_bad_arguments_of_load(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dense='fast': expected one of decoded, packed, auto"):
        moeinf.load(folder, dense="fast")
    with pytest.raises(ValueError, match="dense='packed' has no kernels of torch"):
        moeinf.load(folder, dense="packed", linear="torch")
    for how in ("decoded", "packed", "auto"):
        with pytest.raises(ValueError, match="device=None: expected auto, cpu, cuda or cuda:N"):
            moeinf.load(folder, dense=how, device=cast(Any, None))
    moeinf.load(folder, dense="packed", device_map={"": "cpu"})
    with pytest.raises(UnsupportedError, match="dense='packed' computes on the CPU, not on cuda"):
        moeinf.load(folder, dense="packed", device="cuda:0")

"""The expert FFN on the CPU: against a slow float64 reference, and identical bits in any waves."""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch

from moeinf import _core
from moeinf.checkpoint.formats import FORMATS
from moeinf.checkpoint.layout import Layout
from moeinf.errors import UnsupportedError
from moeinf.experts.cpu import core_expert
from moeinf.kernels.forms import ExpertForm, Gate
from moeinf.kernels.gates import ACTIVATIONS, GATES

ISAS = [name for name, supported in _core.cpu_kernels() if supported]
DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
}
FORMAT_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
# (function, activation) of every gate that there is.
GATE_NAMES = [
    (function, activation)
    for function in GATES
    for activation in ACTIVATIONS
    if "activation" in GATES[function].constants or activation == "silu"
]

# Largest error over the largest sum of absolute values of what a result is summed from. bf16
# hidden states and weights may round the inner activations to bf16; all else is float32 throughout.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 1e-5, torch.float32: 1e-5}


@pytest.fixture(scope="module", params=ISAS)
def engine(request: pytest.FixtureRequest) -> _core.CpuEngine:
    return _core.CpuEngine(threads=2, kernels=request.param)


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


@dataclass
class Placed:
    """One matrix of all experts, and the place of its rows in a slot."""

    values: torch.Tensor  # [E, N, K]
    offset: int = 0  # bytes
    stride: int = 0
    bias: torch.Tensor | None = None  # [E, N]
    bias_offset: int = 0
    bias_stride: int = 0

    @property
    def core(self) -> _core.Matrix:
        _, rows, cols = self.values.shape
        has_bias = self.bias is not None
        return _core.Matrix(
            format=FORMAT_NAMES[self.values.dtype],
            rows=rows,
            cols=cols,
            values=_core.Rows(self.offset, self.stride),
            bias=_core.Rows(self.bias_offset, self.bias_stride) if has_bias else None,
            bias_dtype=DTYPES[self.bias.dtype] if has_bias else _core.DType.f32,
        )

    def write(self, slot: torch.Tensor, expert: int) -> None:
        """Into one slot, uint8 [slot_bytes]."""
        put_rows(slot, self.values[expert], self.offset, self.stride)
        if self.bias is not None:
            put_rows(slot, self.bias[expert, :, None], self.bias_offset, self.bias_stride)

    def apply(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """float64"""
        y = self.values[expert].double() @ x
        return y if self.bias is None else y + self.bias[expert].double()

    def terms(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """float64: the sums of the absolute values that `apply` sums."""
        y = self.values[expert].double().abs() @ x.abs()
        return y if self.bias is None else y + self.bias[expert].double().abs()


def put_rows(slot: torch.Tensor, rows: torch.Tensor, offset: int, stride: int) -> None:
    for n, row in enumerate(rows.contiguous()):
        raw = row.view(torch.uint8)
        slot[offset + n * stride : offset + n * stride + len(raw)] = raw


def textbook_activation(name: str, x: torch.Tensor) -> torch.Tensor:
    return {
        "silu": torch.nn.functional.silu,
        # Forms of the textbook's 1 + erf and 1 + tanh that do not cancel where x is negative.
        "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
        "gelu_tanh": lambda x: x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3)),
        "relu": torch.relu,
        "relu2": lambda x: torch.where(x > 0, x * x, 0),
    }[name](x)


def textbook_gate(gate: Gate, g: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    a, limit = gate.alpha, gate.limit
    if gate.function == "plain":
        return textbook_activation(gate.activation, g)
    assert u is not None
    low, near = g.clip(None, limit), u.clip(-limit, limit)
    if gate.function == "glu":
        return textbook_activation(gate.activation, g) * u
    if gate.function == "swiglu_oai":
        return (near + 1) * low / (1 + torch.exp(-a * low))
    if gate.function == "clamped_glu":
        return textbook_activation(gate.activation, low) * near
    if gate.function == "glu_clamped":
        return textbook_activation(gate.activation, g).clip(None, limit) * near
    assert gate.function == "softcap_swiglu"
    return a * torch.tanh(g / a) / (1 + torch.exp(-g)) * limit * torch.tanh(u / limit)


@dataclass
class Case:
    """One call: slots are bytes, poisoned with NaN wherever no weight of a routed expert lies."""

    hidden: torch.Tensor  # [T, H]
    ids: torch.Tensor  # [T, k]
    scale: torch.Tensor  # [T, k]
    gate: Placed  # [E, I, H]
    up: Placed | None
    down: Placed  # [E, H, I]
    function: Gate
    slots: torch.Tensor  # uint8 [E, slot_bytes], in shuffled order
    slot_of: list[int]
    whole_tokens: int = 0  # of the call that this is a part of

    @property
    def expert(self) -> _core.ExpertFfn:
        return _core.ExpertFfn(
            gate=self.gate.core,
            up=self.up.core if self.up else None,
            down=self.down.core,
            function=_core.Gate(
                self.function.function,
                self.function.activation,
                alpha=self.function.alpha,
                limit=self.function.limit,
            ),
        )

    @property
    def input(self) -> _core.FfnInput:
        return _core.FfnInput(
            hidden=self.hidden.data_ptr(),
            hidden_dtype=DTYPES[self.hidden.dtype],
            topk_ids=self.ids.data_ptr(),
            ids_are_int64=self.ids.dtype == torch.int64,
            topk_weights=self.scale.data_ptr(),
            topk_weights_dtype=DTYPES[self.scale.dtype],
            tokens=self.hidden.shape[0],
            top_k=self.ids.shape[1],
            num_experts=self.experts,
            whole_tokens=self.whole_tokens,
        )

    @property
    def experts(self) -> int:
        return len(self.slots)

    def address(self, expert: int) -> int:
        return self.slots[self.slot_of[expert]].data_ptr()

    def part(self, first: int, last: int, whole_tokens: int = 0) -> Case:
        hidden, ids, scale = (x[first:last].clone() for x in (self.hidden, self.ids, self.scale))
        return replace(self, hidden=hidden, ids=ids, scale=scale, whole_tokens=whole_tokens)

    def fill_slots(self) -> None:
        """Bytes of all ones are NaN in every format."""
        self.slots.fill_(255)
        for expert in set(self.ids.flatten().tolist()) - {-1}:
            for matrix in (self.gate, self.up, self.down):
                if matrix is not None:
                    matrix.write(self.slots[self.slot_of[expert]], expert)

    def run(
        self,
        engine: _core.CpuEngine,
        out_dtype: torch.dtype = torch.float32,
        waves: list[list[int]] | None = None,
    ) -> torch.Tensor:
        """[T, H]; `waves` are lists of positions, computed one after another."""
        call = _core.ExpertFfnCall(engine, self.expert, self.input)
        if waves is None:
            waves = [list(range(len(call.experts)))]
        for wave in waves:
            call.compute([(p, self.address(call.experts[p])) for p in wave])
        out = torch.full(self.hidden.shape, math.nan, dtype=out_dtype)
        call.finish(out.data_ptr(), DTYPES[out_dtype])
        return out

    def reference(self) -> torch.Tensor:
        """float64 [T, H], token by token and expert by expert."""
        return self.reference_and_sizes()[0]

    def reference_and_sizes(self) -> tuple[torch.Tensor, float, float]:
        """float64 [T, H], the largest sum of absolute values that the result is summed from, and
        how much the result moves at most with its gate and up values, by their terms."""
        out = torch.zeros(self.hidden.shape, dtype=torch.float64)
        size, moves = torch.zeros_like(out), torch.zeros_like(out)
        for t, x in enumerate(self.hidden.double()):
            for expert, scale in zip(self.ids[t].tolist(), self.scale[t].double(), strict=True):
                if expert < 0:
                    continue
                gate = self.gate.apply(expert, x)
                up = self.up.apply(expert, x) if self.up else None
                inner = textbook_gate(self.function, gate, up)
                out[t] += scale * self.down.apply(expert, inner)
                size[t] += scale.abs() * self.down.terms(expert, inner)
                near = 1e-6
                moved = torch.zeros_like(inner)
                for g, u in itertools.product((-near, near), repeat=2):
                    other = textbook_gate(
                        self.function,
                        gate + g * self.gate.terms(expert, x),
                        up if up is None else up + u * self.up.terms(expert, x),
                    )
                    moved = torch.maximum(moved, (other - inner).abs() / near)
                moves[t] += scale.abs() * (self.down.values[expert].double().abs() @ moved)
        return out, *(float(one.max()) if one.numel() else 0.0 for one in (size, moves))


def make_case(
    seed: int,
    *,
    tokens: int = 5,
    hidden: int = 64,
    intermediate: int = 48,
    experts: int = 7,
    top_k: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    weights: torch.dtype | dict[str, torch.dtype] | None = None,
    function: Gate | None = None,
    bias: torch.dtype | None = None,
    placement: str = "concatenated",
    ids_dtype: torch.dtype = torch.int64,
    skip: float = 0.15,
    repeat: bool = True,
) -> Case:
    """`weights` is the format of all matrices, or of each by name. `placement`: rows of gate and up
    one matrix after the other (concatenated), in turn (interleaved), or with gaps (gapped). `skip`
    is the share of routes without an expert; `repeat` lets a token name one twice."""
    function = function or Gate()
    formats = weights if isinstance(weights, dict) else dict.fromkeys("gud", weights or dtype)
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x = normal(tokens, hidden).to(dtype)
    # The last expert is left without tokens.
    routed = max(1, experts - 1)
    if repeat:
        ids = torch.randint(0, routed, (tokens, top_k), generator=rng)
    else:
        ids = torch.stack([torch.randperm(routed, generator=rng)[:top_k] for _ in range(tokens)])
    ids = ids.masked_fill(torch.rand(tokens, top_k, generator=rng) < skip, -1).to(ids_dtype)
    scale = normal(tokens, top_k).abs().to(dtype)

    def matrix(name: str, rows: int, cols: int, size: float) -> Placed:
        values = (normal(experts, rows, cols) * size / cols**0.5).to(formats[name])
        return Placed(values, bias=normal(experts, rows).to(bias) if bias else None)

    gate = matrix("g", intermediate, hidden, 1.5)
    up = matrix("u", intermediate, hidden, 1.5) if function.function != "plain" else None
    down = matrix("d", hidden, intermediate, 1)

    end = place(12, [m for m in (gate, up) if m is not None], placement)
    end = place(end + 20, [down], "gapped" if placement == "gapped" else "concatenated")
    slots = torch.empty(experts, (end // 64 + 2) * 64, dtype=torch.uint8)
    order = torch.randperm(experts, generator=rng).tolist()
    case = Case(x, ids, scale, gate, up, down, function, slots, order)
    case.fill_slots()
    return case


def place(offset: int, matrices: list[Placed], placement: str) -> int:
    """Gives each matrix, and each bias, its place behind byte `offset`; returns the end."""
    tensors = [m.values for m in matrices], [m.bias for m in matrices if m.bias is not None]
    for kind, parts in zip(("", "bias_"), tensors, strict=True):
        for at, tensor in enumerate(parts):
            count, row = tensor.shape[1], tensor[0, 0].nbytes
            if placement == "interleaved":
                start, stride = offset + at * row, row * len(parts)
            else:
                start = offset = (offset + 11) // 4 * 4
                stride = row + (3 * tensor.element_size() if placement == "gapped" else 0)
                offset += count * stride
            setattr(matrices[at], f"{kind}offset", start)
            setattr(matrices[at], f"{kind}stride", stride)
        if parts and placement == "interleaved":
            offset += count * stride
        offset = (offset + 11) // 4 * 4
    return offset


def assert_matches(case: Case, found: torch.Tensor, tolerance: float) -> None:
    expected, size, moves = case.reference_and_sizes()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if expected.numel():
        error = float((found.double() - expected).abs().max())
        # Where the terms of a gate value cancel, the error of its float32 sum is left.
        assert error <= tolerance * size + 2**-21 * moves, (
            f"error {error:.2e} of {size:.2e}, allowed {tolerance:.1e}"
        )


def random_gate(rng: random.Random, names: tuple[str, str] | None = None) -> Gate:
    """With constants that matter to values of about 1."""
    return Gate(*(names or rng.choice(GATE_NAMES)), rng.uniform(0.7, 2), rng.uniform(0.6, 2))


def test_the_tables_of_the_core_hold_the_rows_of_python():
    assert _core.weight_formats() == list(FORMATS)
    assert _core.gate_functions() == list(GATES)
    assert _core.activations() == list(ACTIVATIONS)


@pytest.mark.parametrize("names", GATE_NAMES, ids="-".join)
def test_every_gate_in_every_format_and_placement(engine, seed, names):
    rng = random.Random(seed)
    for dtype, has_bias, placement in itertools.product(
        DTYPES, [True, False], ["concatenated", "interleaved", "gapped"]
    ):
        case = make_case(
            rng.randrange(2**31),
            tokens=rng.choice([1, 2, 5]),
            hidden=rng.choice([1, 16, 33, 70]),
            intermediate=rng.choice([1, 31, 32, 53]),
            top_k=2,
            dtype=dtype,
            function=random_gate(rng, names),
            bias=rng.choice([torch.float32, dtype]) if has_bias else None,
            placement=placement,
        )
        assert_matches(case, case.run(engine), TOLERANCE[dtype])


@pytest.mark.parametrize("placement", ["interleaved", "gapped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_the_rows_lie(engine, seed, dtype, placement):
    """Many tokens and few: weights are walked in two ways."""
    for tokens in (2, 90):
        options = {"tokens": tokens, "hidden": 130, "intermediate": 101, "dtype": dtype,
                   "bias": torch.float32}  # fmt: skip
        found = make_case(seed, placement=placement, **options).run(engine)
        assert torch.equal(found, make_case(seed, **options).run(engine))


def test_matrices_of_one_expert_may_differ_in_format(engine, seed):
    for formats in itertools.product(DTYPES, repeat=3):
        weights = dict(zip("gud", formats, strict=True))
        case = make_case(seed, tokens=3, hidden=37, intermediate=41, weights=weights)
        assert_matches(case, case.run(engine), TOLERANCE[torch.bfloat16])


def test_what_a_layout_says_is_what_the_core_computes(engine, seed):
    """From form and layout, as the operator does it; the pool's padding is NaN."""
    rng = random.Random(seed)
    for has_gate, has_bias, interleaved in itertools.product([True, False], repeat=3):
        function = random_gate(rng, ("swiglu_oai", "silu") if has_gate else ("plain", "relu2"))
        bias = torch.bfloat16 if has_bias else None
        case = make_case(rng.randrange(2**31), hidden=47, intermediate=30, function=function,
                         bias=bias)  # fmt: skip
        form = ExpertForm(function, has_gate, has_bias)
        layout = Layout.of(form, FORMATS["bf16"], 47, 30, interleaved=interleaved)
        pool = torch.full((case.experts, layout.slot_bytes), 255, dtype=torch.uint8)
        views = layout.matrices(pool)
        for matrix, view in ((case.gate, views.gate), (case.up, views.up), (case.down, views.down)):
            if matrix is not None:
                view.values.copy_(matrix.values)
                if has_bias:
                    view.bias.copy_(matrix.bias)
        out = torch.full(case.hidden.shape, math.nan)
        _core.fused_experts_raw(engine, core_expert(form, layout), case.input,
                                slots=[slot.data_ptr() for slot in pool], out=out.data_ptr(),
                                out_dtype=_core.DType.f32)  # fmt: skip
        assert torch.equal(out, case.run(engine))


def test_the_list_of_kernels_ends_with_one_that_runs_everywhere():
    names = [name for name, _ in _core.cpu_kernels()]
    assert names[-1] == "portable" and "portable" in ISAS
    assert _core.CpuEngine(threads=1).kernels == ISAS[0]


def test_an_unknown_set_of_kernels_is_refused_with_a_list_of_those_there_are():
    with pytest.raises(ValueError, match=r"no kernels are named 'sse9'.*portable"):
        _core.CpuEngine(kernels="sse9")
    for name, supported in _core.cpu_kernels():
        if not supported:
            with pytest.raises(UnsupportedError, match=f"'{name}'.*portable"):
                _core.CpuEngine(kernels=name)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(engine, seed, tokens, dtype):
    rng = random.Random(seed)
    for round_ in range(4):
        case = make_case(
            seed + round_,
            tokens=tokens,
            hidden=rng.choice([1, 7, 16, 33, 64, 100, 130]),
            intermediate=rng.choice([1, 5, 24, 31, 48, 53, 97]),
            top_k=rng.randint(1, 8),
            dtype=dtype,
            function=random_gate(rng),
            ids_dtype=rng.choice([torch.int32, torch.int64]),
        )
        assert_matches(case, case.run(engine), TOLERANCE[dtype])


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
def test_hidden_states_and_weights_may_differ_in_format(engine, seed, hidden_dtype, weights):
    case = make_case(
        seed, tokens=9, hidden=75, intermediate=61, dtype=hidden_dtype, weights=weights
    )
    both_bf16 = hidden_dtype == weights == torch.bfloat16
    assert_matches(
        case, case.run(engine), TOLERANCE[torch.bfloat16 if both_bf16 else torch.float32]
    )


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_the_result_is_rounded_once_to_the_format_asked_for(engine, seed, out_dtype):
    case = make_case(seed, tokens=6, hidden=77)
    assert torch.equal(case.run(engine, out_dtype), case.run(engine).to(out_dtype))


@pytest.mark.parametrize("names", GATE_NAMES, ids="-".join)
def test_gates_keep_their_relative_accuracy(engine, names):
    """One-element networks whose inner value is the gate itself, over all magnitudes."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 30, 601)])
    x = torch.cat([x, -torch.logspace(-30, 0, 301)]).float().unsqueeze(1)
    case = make_case(0, tokens=len(x), hidden=1, intermediate=1, experts=2, top_k=1, skip=0,
                     dtype=torch.float32, function=Gate(*names, alpha=1.5, limit=4.0))  # fmt: skip
    case.hidden, case.scale = x, torch.ones(len(x), 1)
    for matrix in (case.gate, case.up, case.down):
        if matrix is not None:
            matrix.values.fill_(1)
    case.fill_slots()
    expected = case.reference()
    found = case.run(engine).double()
    # What float32 cannot hold, and a gated product beyond its range, is not asked of it.
    fits = (expected.abs() > 1e-36) & (expected.abs() < 3e38)
    error = ((found - expected).abs() / expected.abs())[fits]
    assert fits.sum() > 1000 and error.max() < 1e-4, f"relative error {error.max():.2e}"
    assert (error < 2e-6).double().mean() > 0.75


@pytest.mark.parametrize("names", GATE_NAMES, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_reach_the_token_they_belong_to_and_no_other(engine, seed, names, dtype):
    case = make_case(seed, tokens=4, hidden=37, intermediate=35, dtype=dtype, skip=0,
                     function=Gate(*names, limit=4.0))  # fmt: skip
    clean = case.run(engine)
    for value in (math.nan, math.inf, -math.inf):
        case.hidden[2, 36] = value
        found = case.run(engine)
        for token in (0, 1, 3):
            assert torch.equal(found[token], clean[token])
        # A function with a limit makes an infinity finite again; NaN stays NaN.
        if math.isnan(value) or "limit" not in GATES[names[0]].constants:
            assert not torch.isfinite(found[2]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_waves_threads_or_company(engine, seed, dtype):
    rng = random.Random(seed)
    case = make_case(seed, tokens=90, hidden=130, intermediate=101, top_k=4, dtype=dtype)
    whole = case.run(engine)
    count = len(_core.ExpertFfnCall(engine, case.expert, case.input).experts)
    for _ in range(4):
        positions = rng.sample(range(count), count)
        cuts = sorted(rng.sample(range(1, count), rng.randint(0, count - 1)))
        waves = [positions[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        assert torch.equal(case.run(engine, waves=waves), whole), f"waves {waves}"
    for threads in (1, 3, 5):
        other = _core.CpuEngine(threads=threads, kernels=engine.kernels)
        assert torch.equal(case.run(other), whole), f"{threads} threads"
    # A token in a part of the call gets the bits that it gets in the whole, and a token by itself
    # those that it gets among few.
    for first, last in ((0, 1), (41, 44), (60, 90)):
        part = case.part(first, last, whole_tokens=90).run(engine)
        assert torch.equal(part, whole[first:last]), f"tokens {first}:{last}"
    few = case.part(20, 26)
    for first in range(6):
        assert torch.equal(few.part(first, first + 1).run(engine), few.run(engine)[first][None])


def test_weights_are_not_read_outside_their_segments(engine, seed):
    """Segments that end where the mapped memory ends: one byte too far would be a fault."""
    import mmap

    page = mmap.PAGESIZE
    for dtype, tokens in itertools.product(DTYPES, (3, 50)):
        case = make_case(seed, tokens=tokens, hidden=37, intermediate=29, experts=2, top_k=1,
                         skip=0, dtype=dtype)  # fmt: skip
        expected = case.run(engine)
        nbytes = case.down.values[0].nbytes
        pages = -(-nbytes // page)
        area = mmap.mmap(-1, (pages + 1) * page)
        memory = torch.frombuffer(area, dtype=torch.uint8)
        libc_protect(memory.data_ptr() + pages * page, page)
        start = pages * page - nbytes
        memory[start : start + nbytes] = case.down.values[0].view(torch.uint8).flatten()
        slot = case.address(0)
        # Far from the slot, but an offset all the same.
        case.down.offset = (memory.data_ptr() + start - slot) % 2**64
        assert torch.equal(case.run(engine), expected)
        del memory


def libc_protect(address: int, nbytes: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0) == 0


def test_says_which_experts_it_needs_in_order_of_first_appearance(engine):
    case = make_case(0, tokens=3, top_k=3)
    case.ids = torch.tensor([[4, -1, 2], [2, 2, 0], [4, 5, 7]])
    call = _core.ExpertFfnCall(engine, case.expert, case.input)
    assert call.experts == [4, 2, 0, 5]
    assert call.counts == [2, 3, 1, 1]


def test_a_token_without_experts_gets_zeros(engine):
    case = make_case(1, tokens=4, top_k=2)
    case.ids.fill_(-1)
    case.scale.fill_(math.nan)
    assert torch.equal(case.run(engine), torch.zeros_like(case.run(engine)))


@pytest.mark.parametrize("bad", [-2, 8, 2**40, -(2**40)])
def test_an_id_out_of_range_is_refused_by_name(engine, bad):
    case = make_case(2, tokens=3, top_k=3)
    case.ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"-1 to 7, found {bad} at token 1, position 2"):
        case.run(engine)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_router_weight_that_is_not_finite_is_of_its_token_alone(engine, bad):
    case = make_case(3, tokens=3, top_k=3, skip=0)
    clean = case.run(engine)
    case.scale[2, 1] = bad
    found = case.run(engine)
    assert torch.equal(found[:2], clean[:2])
    assert not torch.isfinite(found[2]).any()


def test_misuse_is_refused(engine):
    case = make_case(4, tokens=3, skip=0)
    call = _core.ExpertFfnCall(engine, case.expert, case.input)
    out = torch.empty(case.hidden.shape)
    first = (0, case.address(call.experts[0]))
    with pytest.raises(ValueError, match=r"position 99 of"):
        call.compute([(99, 0)])
    call.compute([first])
    with pytest.raises(ValueError, match="was computed before"):
        call.compute([first])
    if len(call.experts) > 1:
        with pytest.raises(ValueError, match=f"before expert {call.experts[1]} was computed"):
            call.finish(out.data_ptr(), _core.DType.f32)
    with pytest.raises(ValueError, match="one slot address for each of 7 experts"):
        _core.fused_experts_raw(engine, make_case(4).expert, case.input, slots=[0],
                                out=out.data_ptr(), out_dtype=_core.DType.f32)  # fmt: skip
    with pytest.raises(ValueError, match=r"0 .all CPUs. to 1024 threads"):
        _core.CpuEngine(threads=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("glue", "silu"), "no gate function is named 'glue'; there are: glu, plain, swiglu_oai"),
        (("glu", "swish"), "no activation is named 'swish'; there are: silu, gelu, gelu_tanh"),
        (("swiglu_oai", "relu"), "has an activation of its own: expected 'silu', found 'relu'"),
        (("swiglu_oai", "silu", math.nan), "'swiglu_oai': expected a finite alpha above 0"),
        (("clamped_glu", "silu", 1.0, 0.0), "'clamped_glu': expected a limit above 0"),
        (("softcap_swiglu", "silu", 1.0, math.inf), "expected a finite limit above 0, found inf"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(arguments, message):
    names, constants = arguments[:2], dict(zip(("alpha", "limit"), arguments[2:]))  # noqa: B905
    with pytest.raises(ValueError, match=message):
        _core.Gate(*names, **constants)


@pytest.mark.parametrize(
    ("matrix", "changes", "message"),
    [
        ("gate", {"rows": 0}, "sizes must be positive"),
        ("up", {"rows": 47}, "up: expected 48 x 64 to go with gate, got 47 x 64"),
        ("down", {"cols": 47}, "down: expected 64 x 48 to go with gate, got 64 x 47"),
        ("gate", {"format": "fp9"}, "no weight format is named 'fp9'; there are: bf16, f16, f32"),
        ("gate", {"values": (1, 128)}, "gate: offsets and strides must be multiples of 2 bytes"),
        ("down", {"values": (0, 97)}, "down: offsets and strides must be multiples of 2 bytes"),
        ("up", {"values": (0, 126)}, "up: a row has 128 bytes, the next begins after 126"),
        ("up", {"values": (0, -128)}, "up: a row has 128 bytes, the next begins after -128"),
        ("gate", {"scales": (0, 4)}, "gate: bf16 has no scales, got some"),
        ("gate", {"bias": (0, 4)}, "every matrix has a bias or none has one; .* from up down"),
        ("down", {"bias": (0, 4)}, "every matrix has a bias or none has one; .* from gate up"),
        ("up", {"bias": (2, 4)}, "up bias: offsets and strides must be multiples of 4 bytes"),
        ("up", {"bias": (0, 0)}, "up bias: a row has 4 bytes, the next begins after 0"),
        ("up", None, "the gate function needs up, and there is none"),
    ],
)
def test_an_expert_whose_matrices_cannot_be_is_refused_by_name(matrix, changes, message):
    def made(name: str, rows: int, cols: int) -> _core.Matrix | None:
        options = {"format": "bf16", "rows": rows, "cols": cols, "values": (0, cols * 2)}
        if name == matrix:
            if changes is None:
                return None
            options |= changes
        for key in {"values", "scales", "bias"} & options.keys():
            options[key] = _core.Rows(*options[key])
        if "scales" in options:
            options["scales"] = _core.Scales(options["scales"], _core.ScaleType.f32, 1, 0)
        return _core.Matrix(**options)

    with pytest.raises(ValueError, match=message):
        _core.ExpertFfn(gate=made("gate", 48, 64), up=made("up", 48, 64),
                        down=made("down", 64, 48), function=_core.Gate("glu", "silu"))  # fmt: skip
    if changes is None:
        with pytest.raises(ValueError, match="has no up, and there is one"):
            matrix = "none"
            _core.ExpertFfn(gate=made("gate", 48, 64), up=made("up", 48, 64),
                            down=made("down", 64, 48),
                            function=_core.Gate("plain", "relu"))  # fmt: skip


def test_the_call_without_a_cache_gives_the_same(engine, seed):
    case = make_case(seed, tokens=11)
    out = torch.full(case.hidden.shape, math.nan)
    slots = [case.address(e) for e in range(case.experts)]
    _core.fused_experts_raw(engine, case.expert, case.input, slots=slots, out=out.data_ptr(),
                            out_dtype=_core.DType.f32)  # fmt: skip
    assert torch.equal(out, case.run(engine))


def test_calls_from_many_threads_take_turns(engine, seed):
    from concurrent.futures import ThreadPoolExecutor

    cases = [make_case(seed + i, tokens=1 + 7 * i, hidden=96) for i in range(6)]
    expected = [case.run(engine) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, want in zip(pool.map(lambda c: c.run(engine), cases), expected, strict=True):
                assert torch.equal(found, want)


def test_a_forked_child_is_told_to_make_its_own_engine(seed):
    engine = _core.CpuEngine(threads=2)
    case = make_case(seed, tokens=40, hidden=256, intermediate=256)
    expected = case.run(engine)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            case.run(engine)
        except UnsupportedError as error:
            own = case.run(_core.CpuEngine(threads=2))
            status = 0 if "fork" in str(error) and torch.equal(own, expected) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(case.run(engine), expected)

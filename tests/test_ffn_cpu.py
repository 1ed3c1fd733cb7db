"""The expert FFN on the CPU: against a slow float64 reference, and identical bits in any waves."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass

import pytest
import torch

from moeinf import _core
from moeinf.errors import UnsupportedError

ISAS = [name for name, supported in _core.cpu_kernels() if supported]
DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
}
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]

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
class Case:
    """One call: slots are bytes, poisoned with NaN wherever no weight of a routed expert lies."""

    hidden: torch.Tensor  # [T, H]
    ids: torch.Tensor  # [T, k]
    scale: torch.Tensor  # [T, k]
    gate_up: torch.Tensor  # [E, 2I or I, H]
    down: torch.Tensor  # [E, H, I]
    activation: str
    gated: bool
    slots: torch.Tensor  # uint8 [E, slot_bytes], in shuffled order
    slot_of: list[int]
    gate_up_offset: int
    down_offset: int

    @property
    def shape(self) -> _core.FfnShape:
        return _core.FfnShape(
            hidden=self.hidden.shape[1],
            intermediate=self.down.shape[2],
            weights=DTYPES[self.down.dtype],
            activation=getattr(_core.Activation, self.activation),
            gated=self.gated,
            gate_up_offset=self.gate_up_offset,
            down_offset=self.down_offset,
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
            num_experts=self.down.shape[0],
        )

    def address(self, expert: int) -> int:
        return self.slots[self.slot_of[expert]].data_ptr()

    def run(
        self,
        engine: _core.CpuEngine,
        out_dtype: torch.dtype = torch.float32,
        waves: list[list[int]] | None = None,
    ) -> torch.Tensor:
        """[T, H]; `waves` are lists of positions, computed one after another."""
        ffn = _core.FfnPass(engine, self.shape, self.input)
        if waves is None:
            waves = [list(range(len(ffn.experts)))]
        for wave in waves:
            ffn.compute([(p, self.address(ffn.experts[p])) for p in wave])
        out = torch.full(self.hidden.shape, math.nan, dtype=out_dtype)
        ffn.finish(out.data_ptr(), DTYPES[out_dtype])
        return out

    def reference(self) -> torch.Tensor:
        """float64 [T, H], token by token and expert by expert."""
        return self.reference_and_size()[0]

    def reference_and_size(self) -> tuple[torch.Tensor, float]:
        """float64 [T, H], and the largest sum of absolute values that the result is summed from."""
        act = {
            "silu": torch.nn.functional.silu,
            # Forms of the textbook's 1 + erf and 1 + tanh that do not cancel where x is negative.
            "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
            "gelu_tanh": lambda x: x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3)),
            "relu": torch.relu,
        }[self.activation]
        out = torch.zeros(self.hidden.shape, dtype=torch.float64)
        size = torch.zeros_like(out)
        for t, x in enumerate(self.hidden.double()):
            for expert, scale in zip(self.ids[t].tolist(), self.scale[t].double(), strict=True):
                if expert < 0:
                    continue
                first = self.gate_up[expert].double() @ x
                if self.gated:
                    gate, up = first.chunk(2)
                    inner = act(gate) * up
                else:
                    inner = act(first)
                out[t] += scale * (self.down[expert].double() @ inner)
                size[t] += scale.abs() * (self.down[expert].double().abs() @ inner.abs())
        return out, float(size.max()) if size.numel() else 0.0


def make_case(
    seed: int,
    *,
    tokens: int = 5,
    hidden: int = 64,
    intermediate: int = 48,
    experts: int = 7,
    top_k: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    weights: torch.dtype | None = None,
    activation: str = "silu",
    gated: bool = True,
    ids_dtype: torch.dtype = torch.int64,
    skip: float = 0.15,
    repeat: bool = True,
) -> Case:
    """`skip` is the share of routes without an expert; `repeat` lets a token name one twice."""
    weights = weights or dtype
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
    rows = 2 * intermediate if gated else intermediate
    gate_up = (normal(experts, rows, hidden) * 1.5 / hidden**0.5).to(weights)
    down = (normal(experts, hidden, intermediate) / intermediate**0.5).to(weights)

    size = weights.itemsize
    gate_up_offset = size * 3
    down_offset = gate_up_offset + gate_up[0].nbytes + size * 5
    slot_bytes = -(-(down_offset + down[0].nbytes + size) // 64) * 64
    slots = torch.full((experts, slot_bytes // size), math.nan, dtype=weights)
    slot_of = torch.randperm(experts, generator=rng).tolist()
    used = set(ids.flatten().tolist())
    for expert in range(experts):
        if expert not in used:
            continue
        slot = slots[slot_of[expert]]
        slot[3 : 3 + gate_up[0].numel()] = gate_up[expert].flatten()
        start = down_offset // size
        slot[start : start + down[0].numel()] = down[expert].flatten()
    return Case(
        hidden=x,
        ids=ids,
        scale=scale,
        gate_up=gate_up,
        down=down,
        activation=activation,
        gated=gated,
        slots=slots.view(torch.uint8),
        slot_of=slot_of,
        gate_up_offset=gate_up_offset,
        down_offset=down_offset,
    )


def assert_matches(case: Case, found: torch.Tensor, tolerance: float) -> None:
    expected, size = case.reference_and_size()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if expected.numel():
        error = float((found.double() - expected).abs().max())
        assert error <= tolerance * size, (
            f"error {error:.2e} of {size:.2e}, allowed {tolerance:.1e}"
        )


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
            activation=rng.choice(ACTIVATIONS),
            gated=rng.random() < 0.7,
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


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_their_relative_accuracy(engine, activation, gated):
    """One-element networks whose inner value is the activation itself, over all magnitudes."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 30, 601)])
    x = torch.cat([x, -torch.logspace(-30, 0, 301)]).float().unsqueeze(1)
    case = make_case(0, tokens=len(x), hidden=1, intermediate=1, experts=2, top_k=1, skip=0,
                     dtype=torch.float32, activation=activation, gated=gated)  # fmt: skip
    case.hidden, case.scale = x, torch.ones(len(x), 1)
    case.gate_up.fill_(1), case.down.fill_(1)
    typed = case.slots.view(torch.float32)
    typed[case.slot_of[0]] = math.nan
    typed[case.slot_of[0], 3 : 3 + case.gate_up[0].numel()] = 1
    typed[case.slot_of[0], case.down_offset // 4] = 1
    expected = case.reference()
    found = case.run(engine).double()
    # What float32 cannot hold, and a gated product beyond its range, is not asked of it.
    fits = (expected.abs() > 1e-36) & (expected.abs() < 3e38)
    error = ((found - expected).abs() / expected.abs())[fits]
    assert fits.sum() > 1000 and error.max() < 1e-4, f"relative error {error.max():.2e}"
    assert (error < 2e-6).double().mean() > 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_reach_the_token_they_belong_to_and_no_other(
    engine, seed, value, activation, dtype
):
    case = make_case(seed, tokens=4, hidden=37, intermediate=35, dtype=dtype, skip=0,
                     activation=activation)  # fmt: skip
    clean = case.run(engine)
    case.hidden[2, 36] = value
    found = case.run(engine)
    assert not torch.isfinite(found[2]).any()
    for token in (0, 1, 3):
        assert torch.equal(found[token], clean[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_waves_threads_or_company(engine, seed, dtype):
    rng = random.Random(seed)
    case = make_case(seed, tokens=90, hidden=130, intermediate=101, top_k=4, dtype=dtype)
    whole = case.run(engine)
    count = len(_core.FfnPass(engine, case.shape, case.input).experts)
    for _ in range(4):
        positions = rng.sample(range(count), count)
        cuts = sorted(rng.sample(range(1, count), rng.randint(0, count - 1)))
        waves = [positions[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        assert torch.equal(case.run(engine, waves=waves), whole), f"waves {waves}"
    for threads in (1, 3, 5):
        other = _core.CpuEngine(threads=threads, kernels=engine.kernels)
        assert torch.equal(case.run(other), whole), f"{threads} threads"
    # A token by itself, or in a smaller batch, gets the bits it gets among many.
    for first, last in ((0, 1), (41, 44), (60, 90)):
        part = Case(**{**vars(case), "hidden": case.hidden[first:last].clone(),
                       "ids": case.ids[first:last].clone(),
                       "scale": case.scale[first:last].clone()})  # fmt: skip
        assert torch.equal(part.run(engine), whole[first:last]), f"tokens {first}:{last}"


def test_weights_are_not_read_outside_their_segments(engine, seed):
    """Segments that end where the mapped memory ends: one byte too far would be a fault."""
    import mmap

    page = mmap.PAGESIZE
    for dtype in DTYPES:
        case = make_case(seed, tokens=3, hidden=37, intermediate=29, experts=2, top_k=1, skip=0,
                         dtype=dtype)  # fmt: skip
        expected = case.run(engine)
        nbytes = case.down[0].nbytes
        pages = -(-nbytes // page)
        area = mmap.mmap(-1, (pages + 1) * page)
        memory = torch.frombuffer(area, dtype=torch.uint8)
        libc_protect(memory.data_ptr() + pages * page, page)
        start = pages * page - nbytes
        memory[start : start + nbytes] = case.down[0].contiguous().view(torch.uint8).flatten()
        slot = case.address(0)
        case.down_offset = memory.data_ptr() + start - slot  # far, but an offset all the same
        if case.down_offset < 0:
            case.down_offset += 2**64
        assert torch.equal(case.run(engine), expected)
        del memory


def libc_protect(address: int, nbytes: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0) == 0


def test_says_which_experts_it_needs_in_order_of_first_appearance(engine):
    case = make_case(0, tokens=3, top_k=3)
    case.ids = torch.tensor([[4, -1, 2], [2, 2, 0], [4, 5, -1]])
    ffn = _core.FfnPass(engine, case.shape, case.input)
    assert ffn.experts == [4, 2, 0, 5]
    assert ffn.counts == [2, 3, 1, 1]


def test_a_token_without_experts_gets_zeros(engine):
    case = make_case(1, tokens=4, top_k=2)
    case.ids.fill_(-1)
    case.scale.fill_(math.nan)
    assert torch.equal(case.run(engine), torch.zeros_like(case.run(engine)))


@pytest.mark.parametrize("bad", [-2, 7, 2**40, -(2**40)])
def test_an_id_out_of_range_is_refused_by_name(engine, bad):
    case = make_case(2, tokens=3, top_k=3)
    case.ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"expert id {bad} at token 1, position 2 .*\[-1, 7\)"):
        case.run(engine)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_router_weight_that_is_not_finite_is_refused_by_name(engine, bad):
    case = make_case(3, tokens=3, top_k=3, skip=0)
    case.scale[2, 1] = bad
    with pytest.raises(ValueError, match=r"router weight -?(nan|inf) at token 2, position 1"):
        case.run(engine)


def test_misuse_is_refused(engine):
    case = make_case(4, tokens=3, skip=0)
    ffn = _core.FfnPass(engine, case.shape, case.input)
    out = torch.empty(case.hidden.shape)
    first = (0, case.address(ffn.experts[0]))
    with pytest.raises(ValueError, match=r"position 99 of"):
        ffn.compute([(99, 0)])
    ffn.compute([first])
    with pytest.raises(ValueError, match="was computed before"):
        ffn.compute([first])
    if len(ffn.experts) > 1:
        with pytest.raises(ValueError, match=f"before expert {ffn.experts[1]} was computed"):
            ffn.finish(out.data_ptr(), _core.DType.f32)
    case.gate_up_offset += 1
    with pytest.raises(ValueError, match="offsets must be multiples of 2 bytes"):
        case.run(engine)
    with pytest.raises(ValueError, match="one slot address for each of 7 experts"):
        _core.fused_experts_raw(engine, make_case(4).shape, case.input, slots=[0],
                                out=out.data_ptr(), out_dtype=_core.DType.f32)  # fmt: skip
    with pytest.raises(ValueError, match=r"0 .all CPUs. to 1024 threads"):
        _core.CpuEngine(threads=-1)


def test_the_call_without_a_cache_gives_the_same(engine, seed):
    case = make_case(seed, tokens=11)
    out = torch.full(case.hidden.shape, math.nan)
    slots = [case.address(e) for e in range(len(case.down))]
    _core.fused_experts_raw(engine, case.shape, case.input, slots=slots, out=out.data_ptr(),
                            out_dtype=_core.DType.f32)  # fmt: skip
    assert torch.equal(out, case.run(engine))


def test_tokens_per_pass_keeps_to_the_scratch_it_is_given():
    shape = make_case(0, hidden=64, intermediate=48).shape
    assert _core.FfnPass.tokens_per_pass(shape, 4, scratch_bytes=4 * (64 + 48) * 4 * 10) == 10
    assert _core.FfnPass.tokens_per_pass(shape, 4, scratch_bytes=1) == 1


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

"""Experts that lie in no file: tensors of the caller, and a callback."""

from __future__ import annotations

import gc
import math
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_library import fake_cuda_library
from scaled_weights import EVERY, MIXED, random_experts, whole

import moeinf
from moeinf import ExpertForm, ExpertStore, Gate
from moeinf.checkpoint.blocks import NUMBERS
from moeinf.checkpoint.layout import Formats
from moeinf.errors import ReadError

E, H, I, T = 5, 64, 96, 7  # noqa: E741
GELU = ExpertForm(Gate(activation="gelu"))


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def step(seed: int, hidden: int = H) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(T, hidden, generator=make).bfloat16()
    return x, torch.randint(0, E, (T, 2), generator=make), torch.rand(T, 2, generator=make)


def plain(seed: int, layers: int = 2) -> list[dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=make) / shape[-1] ** 0.5).bfloat16()

    return [{"gate_up": normal(E, 2 * I, H), "down": normal(E, H, I)} for _ in range(layers)]


def run(store: ExpertStore, inputs: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    cache = moeinf.ExpertCache(store, **options)
    return moeinf.fused_experts(*inputs, cache, store.num_layers - 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("formats", [*EVERY.values(), *MIXED.values()], ids=[*EVERY, *MIXED])
def test_every_format_passes_through(formats: Formats, device: str, seed: int) -> None:
    width = whole(formats, H)
    experts = random_experts(formats, width, whole(formats, I), E, seed)
    tensors = experts.layout.views(experts.pool)
    store = ExpertStore.from_tensors([tensors], formats=formats)
    assert store.layout == experts.layout
    x, ids, weights = step(seed, width)
    found = run(store, (x, ids, weights), slots=2, device=device)
    assert torch.equal(found, run(store, (x, ids, weights), slots=E, device=device))
    expected, size = experts.expected(x, ids, weights)
    error = (found.double() - expected).norm() / torch.maximum(expected.norm(), size.norm() / 8)
    assert error <= 5e-3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_numbers_that_no_decoder_has_are_refused(device: str, seed: int) -> None:
    experts = random_experts(EVERY["fp8-128x128-f32"], H, I, E, seed)
    tensors = experts.layout.views(experts.pool)
    tensors["down.scales"][3] = torch.nan
    store = ExpertStore.from_tensors([tensors], formats=EVERY["fp8-128x128-f32"])
    x, ids, weights = step(seed)
    ids[0, 0] = 3
    with pytest.raises(ReadError, match=r"layer 0: down.scales, expert 3.*expected finite"):
        run(store, (x, ids, weights), slots=2, device=device)


def as_gate_and_up(one: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"gate": one["gate_up"][:, :I], "up": one["gate_up"][:, I:], "down": one["down"]}


def interleaved(one: dict[str, torch.Tensor]) -> dict[str, Any]:
    rows = one["gate_up"].unflatten(1, (2, I)).transpose(1, 2).flatten(1, 2)
    return {"gate_up": rows.contiguous(), "down": one["down"]}


SHAPES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, Any]], dict[str, Any]]] = {
    "gate and up": (as_gate_and_up, {}),
    "lists": (lambda one: {name: list(t) for name, t in as_gate_and_up(one).items()}, {}),
    "arrays of bytes": (
        lambda one: {name: t.view(torch.uint16).numpy() for name, t in one.items()},
        {"formats": moeinf.FORMATS["bf16"]},
    ),
    "addresses": (
        lambda one: {name: (t.data_ptr(), t.shape, t.dtype) for name, t in one.items()}, {},
    ),
    "transposed": (
        lambda one: {name: t.transpose(1, 2).contiguous() for name, t in one.items()},
        {"transposed": True},
    ),
    "gate and up, transposed": (
        lambda one: {n: t.transpose(1, 2).contiguous() for n, t in as_gate_and_up(one).items()},
        {"transposed": True},
    ),
    "interleaved": (interleaved, {"interleaved": True}),
    "every second expert": (
        lambda one: {name: t.repeat_interleave(2, 0)[::2] for name, t in one.items()}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_as_runtimes_hold_them(shape: str, seed: int) -> None:
    layers, inputs = plain(seed), step(seed)
    expected = run(ExpertStore.from_tensors(layers, form=GELU), inputs, slots=3)
    convert, options = SHAPES[shape]
    store = ExpertStore.from_tensors([convert(one) for one in layers], form=GELU, **options)
    assert torch.equal(run(store, inputs, slots=3), expected)
    one = store.read(1, E - 1)
    rows = one["gate_up"] if shape != "interleaved" else one["gate_up"].unflatten(0, (I, 2)).mT
    assert torch.equal(rows.reshape(2 * I, H) if rows.dim() == 2 else
                       one["gate_up"].unflatten(0, (I, 2)).transpose(0, 1).flatten(0, 1),
                       layers[1]["gate_up"][E - 1])  # fmt: skip
    assert torch.equal(one["down"], layers[1]["down"][E - 1])


def test_biases_and_experts_without_a_gate(seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    form = ExpertForm(Gate("plain", "relu"), has_gate=False, has_bias=True)
    shapes = {"gate": (E, I, H), "down": (E, H, I), "gate.bias": (E, I), "down.bias": (E, H)}
    tensors = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    x, ids, weights = step(seed)
    store = ExpertStore.from_tensors({7: tensors}, form=form)
    assert store.layer_ids == [7]
    found = run(store, (x.float(), ids, weights), slots=2).double()
    gate, down, gate_bias, down_bias = (tensor.double() for tensor in tensors.values())
    inner = torch.einsum("eih,th->tei", gate, x.double()) + gate_bias
    every = torch.einsum("ehi,tei->teh", down, inner.relu()) + down_bias
    picked = every[torch.arange(T)[:, None], ids]
    expected = (picked * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_tensors_are_kept_and_let_go() -> None:
    layers = plain(1)
    expected = run(ExpertStore.from_tensors(layers), step(2), slots=2)
    gone = weakref.ref(layers[0]["down"])
    store = ExpertStore.from_tensors(layers)
    cache = moeinf.ExpertCache(store, slots=2)
    del layers
    junk = plain(3)  # what would lie in their memory
    assert gone() is not None
    assert torch.equal(moeinf.fused_experts(*step(2), cache, 1), expected)
    del store, cache, junk
    gc.collect()
    assert gone() is None


def test_two_caches_on_one_store(seed: int) -> None:
    store, inputs = ExpertStore.from_tensors(plain(seed)), step(seed)
    caches = [moeinf.ExpertCache(store, slots=n, policy=p) for n, p in ((1, "lru"), (4, "learned"))]
    first, second = (moeinf.fused_experts(*inputs, cache, 0) for cache in caches)
    assert torch.equal(first, second)
    assert caches[0].name != caches[1].name


TENSORS = plain(0, layers=1)[0]


@pytest.mark.parametrize(
    "tensors,options,message",
    [
        ({}, {}, "expected a tensor 'gate_up', found none"),
        ({"gate_up": TENSORS["gate_up"]}, {}, "expected a tensor 'down', found gate_up"),
        (TENSORS | {"extra": TENSORS["down"]}, {}, "layer 0: extra: expected gate_up, down"),
        (TENSORS | {"down": TENSORS["down"][:-1]}, {}, r"layer 0: found \[4, 5\] experts"),
        (TENSORS | {"down": TENSORS["down"][:0]}, {}, "down: expected at least one expert"),
        (TENSORS | {"down": TENSORS["down"].double()}, {}, "float64 does not say how"),
        (TENSORS | {"down": TENSORS["down"][0]}, {}, r"expected \[experts, rows, columns\]"),
        (TENSORS | {"gate_up": TENSORS["gate_up"][:, :-2]}, {}, r"gate_up: expected .*\[192, 64\]"),
        (
            TENSORS | {"down": TENSORS["down"].transpose(1, 2)},
            {"transposed": True},
            "gate_up: expected .* for each expert, found",
        ),
        (TENSORS | {"down": TENSORS["down"].to("meta")}, {}, "down: expected a tensor in RAM"),
        (TENSORS | {"down": (0, (E, H, I), torch.bfloat16)}, {}, "found 61440 at address 0"),
        (TENSORS, {"formats": moeinf.FORMATS["f16"]}, "expected torch.float16"),
        (TENSORS, {"formats": EVERY["mxfp4"]}, "layer 0"),
        (TENSORS, {"formats": EVERY["gguf-q8_0"], "transposed": True}, "of one element a value"),
        (TENSORS, {"formats": EVERY["fp8-tensor"], "transposed": True}, "without scales"),
        (TENSORS, {"top_k": E + 1}, "top_k: expected 1 to 5, found 6"),
        (TENSORS, {"form": ExpertForm(has_bias=True)}, "down.bias"),
        (as_gate_and_up(TENSORS), {"interleaved": True}, "gate and up in one tensor"),
    ],
)
def test_tensors_that_make_no_sense(
    tensors: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertStore.from_tensors([tensors], **options)


def test_elements_that_do_not_lie_side_by_side() -> None:
    down = torch.zeros(E, I, H, dtype=torch.bfloat16).transpose(1, 2)
    with pytest.raises(ValueError, match="down: the elements of an expert do not lie side by side"):
        ExpertStore.from_tensors([TENSORS | {"down": down}])


def test_no_layers_and_unlike_layers() -> None:
    with pytest.raises(ValueError, match="layers: expected at least one"):
        ExpertStore.from_tensors([])
    fewer = {name: tensor[:3] for name, tensor in TENSORS.items()}
    with pytest.raises(ValueError, match=r"as many experts in every layer, found \[3, 5\]"):
        ExpertStore.from_tensors([TENSORS, fewer])


def reader(layers: list[dict[str, torch.Tensor]]) -> Callable[[int, int, str, memoryview], int]:
    def read(layer: int, expert: int, segment: str, destination: memoryview) -> int:
        destination[:] = layers[layer][segment][expert].view(torch.uint8).numpy().tobytes()
        return len(destination)

    return read


def called(read: Callable[[int, int, str, memoryview], Any]) -> ExpertStore:
    return ExpertStore.from_callback(
        read, layers=2, num_experts=E, hidden=H, intermediate=I, top_k=2
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 4096}, {"prefetch": "previous"}])
def test_a_callback_fills_slots(device: str, options: dict[str, Any], seed: int) -> None:
    layers, inputs = plain(seed), step(seed)
    expected = run(ExpertStore.from_tensors(layers), inputs, slots=E, device=device)
    sizes: set[int] = set()
    plain_read = reader(layers)

    def read(layer: int, expert: int, segment: str, destination: memoryview) -> int:
        sizes.add(len(destination))
        return plain_read(layer, expert, segment, destination)

    store = called(read)
    cache = moeinf.ExpertCache(store, slots=2, device=device, **options)
    for _ in range(3):
        assert torch.equal(moeinf.fused_experts(*inputs, cache, 1), expected)
    assert sizes == {segment.nbytes for segment in store.layout.segments}
    assert torch.equal(store.read(0, 3)["gate_up"], layers[0]["gate_up"][3])


def test_threads_and_callbacks_wait_for_nobody(seed: int) -> None:
    """Steps on several threads, whose reads all need the interpreter."""
    layers, inputs = plain(seed), step(seed)
    cache = moeinf.ExpertCache(called(reader(layers)), slots=2)
    expected = [run(ExpertStore.from_tensors(layers[: i + 1]), inputs, slots=E) for i in (0, 1)]
    wrong: list[int] = []

    def work(layer: int) -> None:
        for _ in range(20):
            if not torch.equal(moeinf.fused_experts(*inputs, cache, layer), expected[layer]):
                wrong.append(layer)

    threads = [threading.Thread(target=work, args=(i % 2,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_callback_that_fails_fails_the_step_alone(seed: int) -> None:
    layers, inputs = plain(seed), step(seed)
    plain_read, mode = reader(layers), "works"

    def read(layer: int, expert: int, segment: str, destination: memoryview) -> Any:
        if mode == "raises" and layer:
            raise KeyError("no such expert")
        if mode == "short" and layer:
            return len(destination) - 1
        if mode == "says nothing" and layer:
            return None
        return plain_read(layer, expert, segment, destination)

    cache = moeinf.ExpertCache(called(read), slots=2)
    for mode, message in (  # noqa: B007
        ("raises", r"layer 1, expert \d: KeyError: 'no such expert'"),
        ("short", r"layer 1, expert \d: expected \d+ bytes, \d+ were written"),
        ("says nothing", r"expected \d+ bytes, None were written"),
    ):
        with pytest.raises(ReadError, match=message):
            moeinf.fused_experts(*inputs, cache, 1)
        moeinf.fused_experts(*inputs, cache, 0)
    mode = "works"
    expected = run(ExpertStore.from_tensors(layers), inputs, slots=E)
    assert torch.equal(moeinf.fused_experts(*inputs, cache, 1), expected)


ENDS = """
import time, torch, moeinf
def read(layer, expert, segment, destination):
    time.sleep(0.02)
    destination[:] = bytes(len(destination))
    return len(destination)
store = moeinf.ExpertStore.from_callback(
    read, layers=4, num_experts=8, hidden=64, intermediate=64
)
cache = moeinf.ExpertCache(store, slots=16)
for layer in range(4):
    cache.prefetch(layer, range(8))
print("ended")
"""


def test_a_program_may_end_while_callbacks_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


@pytest.mark.parametrize("options", [{"num_experts": 0}, {"layers": 0}, {"hidden": 63}])
def test_sizes_that_make_no_sense(options: dict[str, int]) -> None:
    sizes: dict[str, Any] = {"layers": 1, "num_experts": E, "hidden": H, "intermediate": I}
    with pytest.raises(ValueError, match=r"expected"):
        ExpertStore.from_callback(reader([]), formats=EVERY["nvfp4"], **(sizes | options))


def test_the_example_without_transformers() -> None:
    example = Path(__file__).parent.parent / "examples" / "plain_torch.py"
    code = f"import runpy, sys; runpy.run_path({str(example)!r}, run_name='__main__')"
    code += "; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "experts were in slots" in done.stdout


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_block_that_has_no_number_is_refused(name: str, seed: int) -> None:
    row = EVERY[f"gguf-{name}"]
    width = math.lcm(H, row.pack)
    experts = random_experts(row, width, width, E, seed)
    draw = random.Random(seed)
    for place, kind in NUMBERS[name]:
        pool = experts.pool.clone()
        tensors = experts.layout.views(pool)
        blocks = tensors["down"][3].view(-1, row.unit)
        code = b"\xff" if kind == "e8m0" else draw.choice((b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"))
        block = blocks[draw.randrange(len(blocks))]
        block[place : place + len(code)] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        store = ExpertStore.from_tensors([tensors], formats=row)
        with pytest.raises(ReadError, match=r"layer 0: down, expert 3.*expected finite numbers"):
            moeinf.ExpertCache(store, slots=2).acquire(0, [3])
        moeinf.ExpertCache(store, slots=2).acquire(0, [2]).release()
        with pytest.raises(ReadError, match="expected finite numbers"):
            row.refuse({"values": tensors["down"][3]}, "dense")

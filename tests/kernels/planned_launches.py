"""Calls the kernels as on a GPU, without one, and compares what reaches the driver: each launch out
of a plan against Triton's own dispatch of the same tensors. test_kernels_plans.py runs it.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import triton_without_gpu

LIBRARY = triton_without_gpu.install()  # before the kernels are imported

import torch  # noqa: E402

from moeinf.kernels import (  # noqa: E402
    ExpertForm,
    ExpertMatrices,
    Gate,
    checks,
    combine,
    expert_routes,
    fused_experts,
    launch_plan,
)
from moeinf.kernels.launch_plan import Launch, LaunchPlan, Scratch  # noqa: E402

FORMS = 8
BITS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "u1": 8, "fp32": 32, "f32": 32}


def parameters_of(compiled: Any) -> list[int]:
    """The bits of each parameter that the machine code has, scratch memory left out."""
    constants = {
        name if isinstance(name, str) else compiled.src.fn.arg_names[name[0]]
        for name in compiled.src.constants
    }
    return [
        BITS.get(kind, 64)
        for name, kind in compiled.src.signature.items()
        if kind != "constexpr" and name not in constants
    ]


class Watched:
    """Notes the launches of calls; memory that a call allocates is the same for each."""

    def __init__(self) -> None:
        self.bits: list[list[int]] = []  # of the parameters of each launch
        self.seen: list[tuple[int, ...]] | None = None
        memory: dict[Scratch, torch.Tensor] = {}
        launch_it, remember = Launch.__call__, Launch.remember

        def allocate(plan: LaunchPlan, scratch: Scratch, tensors: Any, addresses: Any) -> None:
            if scratch not in memory:
                memory[scratch] = torch.empty(scratch.shape, dtype=scratch.dtype)
            index = launch_plan.INDEX[scratch.name]
            tensors[index], addresses[index] = memory[scratch], memory[scratch].data_ptr()

        def remembered(self_: Launch, compiled: Any, pointers: Any) -> None:
            if self.seen is None:
                self.bits.append(parameters_of(compiled))
            remember(self_, compiled, pointers)

        def launched(self_: Launch, tensors: Any, addresses: Any) -> None:
            bits = [] if self.seen is None else self.bits[len(self.seen)]
            LIBRARY.recording_driver_note(len(bits))
            launch_it(self_, tensors, addresses)
            if self.seen is not None:
                self.seen.append(noted(bits))

        LaunchPlan.allocate = allocate
        Launch.remember = remembered
        Launch.__call__ = launched

    def by_triton(self, call: Callable[[], object]) -> list[tuple[int, ...]]:
        """What the call launches when nothing is planned."""
        planned, launch_plan.PLANS = launch_plan.PLANS, {}
        self.bits, self.seen = [], None
        call()  # tells how many parameters there are to note
        launch_plan.PLANS = {}
        found = self.by_plan(call)
        launch_plan.PLANS = planned
        return found

    def by_plan(self, call: Callable[[], object]) -> list[tuple[int, ...]]:
        self.seen = []
        call()
        return self.seen


def noted(bits: list[int]) -> tuple[int, ...]:
    last = triton_without_gpu.Launch()
    LIBRARY.recording_driver_last(ctypes.byref(last))
    assert last.function, "another driver was launched on"
    values = [last.parameters[i] & ((1 << width) - 1) for i, width in enumerate(bits)]
    return (last.function, *last.grid, *last.block, last.shared, last.stream, *values)


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further than where memory is aligned."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def further_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with one element between the rows (or the slots)."""
    rows = tensor.shape[0]
    wide = torch.empty(rows, tensor[0].numel() + 1, dtype=tensor.dtype)
    return torch.as_strided(wide, tensor.shape, (wide.shape[1], *tensor[0].contiguous().stride()))


def random_call(draw: random.Random) -> dict[str, Any]:
    T, k, S = draw.choice((1, 1, 2, 5)), draw.choice((1, 2, 3, 8)), draw.choice((1, 7))
    H, I = draw.choice((16, 48, 33)), draw.choice((16, 40))  # noqa: E741
    dtype = draw.choice((torch.bfloat16, torch.float16, torch.float32))
    gated = draw.random() < 0.8
    N = 2 * I if gated else I
    transposed = draw.random() < 0.3
    shapes = ((S, H, N), (S, I, H)) if transposed else ((S, N, H), (S, H, I))
    call: dict[str, Any] = {
        "hidden": torch.zeros(T, H + draw.choice((0, 16, 1)), dtype=dtype)[:, :H],
        "ids": torch.zeros(T, k, dtype=draw.choice((torch.int32, torch.int64))),
        "topk_weights": torch.zeros(T, k, dtype=draw.choice((torch.float32, dtype))),
        "gate_up": torch.zeros(shapes[0], dtype=dtype),
        "down": torch.zeros(shapes[1], dtype=dtype),
        "has_gate": gated,
        "transposed": transposed,
        "interleaved": gated and draw.random() < 0.3,
        "gate": Gate("glu" if gated else "plain", draw.choice(("silu", "relu"))),
    }
    if draw.random() < 0.5:
        call["expert_map"] = torch.zeros(draw.choice((1, 9)), dtype=torch.int32)
    if draw.random() < 0.4:
        call |= {"gate_up_bias": torch.zeros(S, N), "down_bias": torch.zeros(S, H)}
    if draw.random() < 0.3:
        call["out"] = torch.zeros(T, H + draw.choice((0, 1)), dtype=dtype)[:, :H]
    return call


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with its weights as the objects that the contract takes."""
    rest = dict(call)
    fused = ("gate_up", "down", "has_gate", "interleaved", "transposed")
    weights = {name: rest.pop(name) for name in fused}
    biases = {name: rest.pop(name, None) for name in ("gate_up_bias", "down_bias")}
    form = ExpertForm(rest.pop("gate"), call["has_gate"], biases["down_bias"] is not None)
    return rest | {"matrices": ExpertMatrices.of_fused(**weights, **biases), "form": form}


def calls_of(call: dict[str, Any], draw: random.Random) -> Iterator[Callable[[], object]]:
    """A call, then one with a tensor elsewhere, or its rows further apart, then the first again."""
    moved = draw.choice(("hidden", "ids", "topk_weights", "gate_up", "down"))
    elsewhere = call | {moved: at_odd_address(call[moved])}
    spread = draw.choice(("hidden", "gate_up", "down"))
    apart = call | {spread: further_apart(call[spread])}
    for arguments in map(arguments_of, (call, call, elsewhere, elsewhere, apart, apart, call)):
        yield lambda arguments=arguments: fused_experts(**arguments)
    without = arguments_of(call)
    for name in ("topk_weights", "out"):
        without.pop(name, None)
    T, H = call["hidden"].shape
    routes = torch.zeros(T, call["ids"].shape[1], H)
    yield lambda: expert_routes(**without, routes=routes)
    yield lambda: combine(routes, call["ids"], call["topk_weights"], out=call["hidden"])


def check_waves_run_the_same_code(watched: Watched) -> None:
    """A step in one wave and one in many: the same machine code makes every expert's output."""
    for tokens, dtype in itertools.product((1, 3), (torch.bfloat16, torch.float16, torch.float32)):
        tensors = [
            torch.zeros(tokens, 48, dtype=dtype),
            torch.zeros(tokens, 4, dtype=torch.int32),
            torch.zeros(tokens, 4),
            ExpertMatrices.of_fused(
                torch.zeros(7, 80, 48, dtype=dtype), torch.zeros(7, 48, 40, dtype=dtype)
            ),
            ExpertForm(),
        ]
        whole = watched.by_triton(lambda: fused_experts(*tensors))  # noqa: B023
        del tensors[2]
        waves = watched.by_triton(lambda: expert_routes(*tensors))  # noqa: B023
        assert [launch[0] for launch in whole] == [launch[0] for launch in waves], (tokens, dtype)


def main() -> None:
    draw = random.Random(int(sys.argv[1]))
    checks.check_device = lambda device: None  # tensors of the CPU stand for a GPU's
    watched = Watched()
    check_waves_run_the_same_code(watched)
    launches, functions = 0, set()
    for _ in range(FORMS):
        for call in calls_of(random_call(draw), draw):
            expected = watched.by_triton(call)
            watched.by_plan(call)  # makes the plan where there was none
            assert expected, "nothing was launched"
            found = watched.by_plan(call)
            assert found == expected, (found, expected)
            launches += len(found)
            functions |= {launch[0] for launch in found}
    print(f"{launches} launches of {len(functions)} functions are the same")


if __name__ == "__main__":
    main()

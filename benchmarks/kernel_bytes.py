"""Bytes that the decode kernels load and store: counted in Triton's interpreter, and by formula.

    TRITON_INTERPRET=1 python -m benchmarks.kernel_bytes      # counts small layers, prints JSON

`Meter` counts every load and store of the launches made under it. `traffic` computes the same for
any size. The program checks that both agree to the byte. `benchmarks.kernel_evidence` then uses the
formula at sizes that the interpreter cannot run.

A program's load counts each address once, for any number of lanes that ask for it, because a
multiprocessor's coalescer does the same. Loads of weights are also counted by lane and by byte.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

WEIGHTS = ("gate", "up", "down")


@dataclass
class Launch:
    """One kernel's bytes by the name of its argument; `times` says how often each weight was read.

    `times` is flat, one int64 per element of the memory of gate, up or down, every lane counted.
    """

    kernel: str
    programs: int
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    times: dict[str, np.ndarray] = field(default_factory=dict)


class Meter:
    """`with Meter() as meter: fused_experts(...)` leaves one Launch per launch in `meter.launches`.

    Needs a process started with TRITON_INTERPRET=1, and tensors whose memory is one run each and
    no other's, but for arguments that a kernel is given and does not read.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._ranges: list[tuple[int, int, str, int]] = []

    def __enter__(self) -> Meter:
        from triton.runtime import interpreter

        builder: Any = interpreter.InterpreterBuilder
        executor: Any = interpreter.GridExecutor
        self._saved = [
            (builder, "create_masked_load", builder.create_masked_load),
            (builder, "create_masked_store", builder.create_masked_store),
            (executor, "__call__", executor.__call__),
        ]
        (_, _, load), (_, _, store), (_, _, call) = self._saved

        def counted_load(this: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._count(ptrs, mask, stored=False)
            return load(this, ptrs, mask, *rest, **named)

        def counted_store(this: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count(ptrs, mask, stored=True)
            return store(this, ptrs, value, mask, *rest)

        def counted_call(this: Any, *args: Any, **named: Any) -> Any:
            self._begin(this, args, named)
            return call(this, *args, **named)

        builder.create_masked_load = counted_load
        builder.create_masked_store = counted_store
        executor.__call__ = counted_call
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._saved:
            setattr(owner, name, original)

    def _begin(self, executor: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        launch = Launch(executor.fn.__name__, int(np.prod(executor.grid)))
        self._ranges = []
        names = inspect.getfullargspec(executor.fn).args
        given = dict(zip(names, args, strict=False)) | named
        for name in names:
            tensor = given.get(name)
            if not isinstance(tensor, torch.Tensor):
                continue
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
            # An argument that is not read is given another's tensor, which comes before it.
            if all(end <= low or high <= start for low, high, *_ in self._ranges):
                stem = name.removesuffix("_ptr")
                self._ranges.append((start, end, stem, tensor.element_size()))
                if stem in WEIGHTS:
                    launch.times[stem] = np.zeros(last + 1, np.int64)
        self.launches.append(launch)

    def _count(self, ptrs: Any, mask: Any, *, stored: bool) -> None:
        launch = self.launches[-1]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        pointers, wanted = np.broadcast_arrays(ptrs.data, mask.data)
        lanes = pointers[wanted].astype(np.int64)
        if not lanes.size:
            return
        place = next((r for r in self._ranges if r[0] <= lanes[0] < r[1]), None)
        if place is None:
            raise RuntimeError(f"{launch.kernel}: an access outside of every argument")
        start, end, name, element = place
        if not ((start <= lanes) & (lanes < end)).all():
            raise RuntimeError(f"{launch.kernel}: an access that leaves {name}")
        (launch.stored if stored else launch.loaded)[name] += np.unique(lanes).size * size
        if name in launch.times:
            for first in range(0, size, element):  # bytes may be read as words
                np.add.at(launch.times[name], (lanes - start + first) // element, 1)


@dataclass(frozen=True)
class Step:
    """One decode step by sizes: `slots` [T][k] with -1 for absent; sizes of elements in bytes."""

    slots: tuple[tuple[int, ...], ...]
    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    weight_size: int = 2
    id_size: int = 8
    routing_size: int = 4

    @property
    def rows(self) -> int:
        return (2 if self.gated else 1) * self.intermediate

    @property
    def distinct(self) -> int:
        return len({slot for row in self.slots for slot in row if slot >= 0})

    def expert_bytes(self) -> int:
        biases = self.rows + self.hidden if self.biased else 0
        elements = self.rows * self.hidden + self.hidden * self.intermediate + biases
        return elements * self.weight_size

    def least(self) -> int:
        """What any kernel must move: each active expert once, the tokens and the result."""
        return (
            self.distinct * self.expert_bytes()
            + 2 * len(self.slots) * self.hidden * self.weight_size
        )


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def traffic(path: str, step: Step, first: dict[str, int], second: dict[str, int]) -> list[Launch]:
    """The two launches of `vector` or `shared` with these configurations, bytes by formula."""
    return (vector if path == "vector" else shared)(step, first, second)


def first_matrices(step: Step, times: int) -> Counter[str]:
    """Bytes of gate and up, and of their biases, read for `times` experts."""
    rows = times * step.intermediate * step.weight_size
    names = ("gate", "up") if step.gated else ("gate",)
    read = Counter({name: rows * step.hidden for name in names})
    return read | Counter({f"{name}_bias": rows for name in names if step.biased})


def vector(step: Step, first: dict[str, int], second: dict[str, int]) -> list[Launch]:
    T, k, w = len(step.slots), len(step.slots[0]), step.weight_size
    H, I = step.hidden, step.intermediate  # noqa: E741
    present = sum(slot >= 0 for row in step.slots for slot in row)
    blocks = ceil(I, first["BLOCK_I"])
    up = Launch("gate_up_vector", T * k * blocks)
    up.loaded["ids"] = T * k * blocks * step.id_size
    up.loaded |= first_matrices(step, present)
    up.loaded["hidden"] = present * blocks * H * w
    up.stored["act"] = present * I * w
    blocks = ceil(H, second["BLOCK_H"])
    down = Launch("down_vector", T * blocks)
    # Once to find the slot, once more to know whether the route counts in the sum.
    down.loaded["ids"] = T * k * blocks * 2 * step.id_size
    down.loaded["weights"] = T * k * blocks * step.routing_size
    down.loaded["down"] = present * H * I * w
    down.loaded["act"] = present * blocks * I * w
    down.loaded["down_bias"] = present * H * w if step.biased else 0
    down.stored["out"] = T * H * w
    return [up, down]


def shared(step: Step, first: dict[str, int], second: dict[str, int]) -> list[Launch]:
    T, k, w, tokens = len(step.slots), len(step.slots[0]), step.weight_size, 16
    H, I, R, G = step.hidden, step.intermediate, T * k, step.distinct  # noqa: E741
    present = sum(slot >= 0 for row in step.slots for slot in row)
    # A token that names an expert twice has it computed once.
    computed = sum(len({slot for slot in row if slot >= 0}) for row in step.slots)
    blocks = ceil(I, first["BLOCK_I"])
    up = Launch("gate_up_shared", R * blocks)
    up.loaded["ids"] = (2 * R + R * blocks * (1 + R)) * step.id_size
    up.loaded |= first_matrices(step, G)
    up.loaded["hidden"] = computed * blocks * H * w
    up.stored["act"] = computed * I * w
    up.stored["groups"] = (1 + G + R) * 4
    up.stored["rows"] = G * tokens * 4
    blocks, steps = ceil(H, second["BLOCK_H"]), G * ceil(I, second["BLOCK_I"])
    down = Launch("down_shared", blocks)
    down.loaded["groups"] = blocks * (1 + min(G, 1) + steps + R) * 4
    down.loaded["ids"] = blocks * (min(G, 1) + steps) * step.id_size
    down.loaded["rows"] = blocks * (1 + steps) * tokens * 4
    down.loaded["weights"] = blocks * R * step.routing_size
    down.loaded["down"] = G * H * I * w
    down.loaded["act"] = computed * blocks * I * w
    down.loaded["down_bias"] = G * H * w if step.biased else 0
    down.loaded["routes"] = present * H * 4
    down.stored["routes"] = computed * H * 4
    down.stored["out"] = T * H * w
    return [up, down]


def counted(
    path: str, step: Step, spare: int = 2, **options: Any
) -> tuple[list[Launch], torch.Tensor]:
    """Runs the step with random numbers under the meter; its launches, and its result.

    Slots that no route names, and `spare` more, are NaN.
    """
    from moeinf.kernels import ExpertForm, ExpertMatrices, Gate, Matrix, fused_experts
    from moeinf.kernels.forms import PLAIN_FORMATS

    dtype = {2: torch.bfloat16, 4: torch.float32}[step.weight_size]
    named = {slot for row in step.slots for slot in row if slot >= 0}
    S, H, I = max(named, default=0) + 1 + spare, step.hidden, step.intermediate  # noqa: E741

    def segment(*shape: int) -> torch.Tensor:
        made = torch.full((S, *shape), torch.nan, dtype=dtype)
        for slot in named:
            made[slot] = torch.randn(shape) / 8
        return made

    def matrix(rows: int, columns: int) -> Matrix:
        values = segment(columns, rows) if options.get("transposed") else segment(rows, columns)
        values = values.transpose(1, 2) if options.get("transposed") else values
        return Matrix(values, None, segment(rows) if step.biased else None, PLAIN_FORMATS[dtype])

    up = matrix(I, H) if step.gated else None
    matrices = ExpertMatrices(matrix(I, H), up, matrix(H, I))
    gate = Gate("glu" if step.gated else "plain", options.get("activation", "silu"))
    form = ExpertForm(gate, step.gated, step.biased)
    ids = torch.tensor(step.slots, dtype={4: torch.int32, 8: torch.int64}[step.id_size])
    hidden = torch.randn(len(step.slots), H).to(dtype)
    weights = torch.rand(ids.shape, dtype=torch.float32)
    with Meter() as meter:
        out = fused_experts(hidden, ids, weights, matrices, form, path=path)
    return meter.launches, out


def differences(found: list[Launch], said: list[Launch]) -> list[str]:
    """Where the count and the formula disagree."""
    wrong = []
    for one, other in zip(found, said, strict=True):
        if (one.kernel, one.programs) != (other.kernel, other.programs):
            wrong.append(f"{one.kernel} x {one.programs}, not {other.kernel} x {other.programs}")
        for way in ("loaded", "stored"):
            have, want = getattr(one, way), getattr(other, way)
            wrong += [
                f"{one.kernel} {way} {name}: counted {have[name]}, formula {want[name]}"
                for name in sorted(have.keys() | want.keys())
                if have[name] != want[name]
            ]
    return wrong


def configs(
    path: str, step: Step, order: str = "rows"
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """What the committed table says here, where there is no device."""
    from moeinf.kernels import tuning

    dtype = {2: "bfloat16", 4: "float32"}[step.weight_size]
    first, second = (
        tuning.config(
            f"{half}_{path}", ("*",), dtype=dtype, order=order,
            hidden=step.hidden, intermediate=step.intermediate,
        )
        for half in ("gate_up", "down")
    )  # fmt: skip
    return first, second


# One token, tokens that share experts, an expert named twice, absent routes; sizes that no block
# divides.
SMALL: tuple[tuple[str, Step, dict[str, Any]], ...] = (
    ("vector", Step(((2, 0, 5),), 300, 22), {}),
    ("vector", Step(((2, -1, 5, 1, 0),), 70, 37, biased=True, id_size=4), {}),
    ("vector", Step(((0, 3),), 40, 18, gated=False), {"activation": "relu2", "transposed": True}),
    ("vector", Step(((0, 3), (3, 1)), 33, 20, weight_size=4), {}),
    ("shared", Step(((0, 3), (3, 1)), 150, 40), {}),
    ("shared", Step(((4, 3, -1), (3, 1, 1), (0, 3, 4)), 50, 300, biased=True), {}),
    ("shared", Step(((0, 1),) * 16, 40, 24, id_size=4), {"transposed": True}),
    ("shared", Step(((-1, -1), (-1, -1)), 40, 24), {}),
)


def main() -> int:
    checks = []
    for path, step, options in SMALL:
        order = "columns" if options.get("transposed") else "rows"
        launches, _ = counted(path, step, **dict(options))
        wrong = differences(launches, traffic(path, step, *configs(path, step, order)))
        reads = [int(times.max()) for one in launches for times in one.times.values()]
        checks.append(
            {"path": path, "slots": step.slots, "hidden": step.hidden,
             "intermediate": step.intermediate, "most_reads_of_a_weight": max(reads),
             "differences": wrong}
        )  # fmt: skip
    json.dump(checks, sys.stdout, indent=1)
    return int(any(check["differences"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())

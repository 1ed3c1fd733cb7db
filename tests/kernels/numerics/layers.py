"""Random layers and the slow, obvious float64 answer, for the tests of this folder.

Shares no code with the kernels. A layer's slots are strided views into one arena of bytes, as the
cache's are, and whatever no test refers to is NaN.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from textbook import gate_value

from moeinf.kernels import ExpertForm, ExpertMatrices, Gate, Matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of error(). The interpreter rounds as a GPU does: see rounding.py.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# The largest error in a token's row over the root mean square of that row (or of all rows, if that
# is more: a row may be small by cancellation). One wrong element among thousands cannot hide.
ROW_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class Layer:
    """Logical weights of E experts (gate, up [I, H], down [H, I]) and where each lies in slots."""

    T: int
    k: int
    E: int
    H: int
    I: int  # noqa: E741
    dtype: torch.dtype = torch.float32
    seed: int = 0
    function: str = "glu"
    activation: str = "silu"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    scale: float = 1.0
    ids: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=make) * size).to(self.dtype)

        self.has_gate = self.function != "plain"
        E, H, I = self.E, self.H, self.I  # noqa: E741
        self.hidden = normal(self.T, H)
        self.gate = normal(E, I, H, size=self.scale / math.sqrt(H))
        self.up = normal(E, I, H, size=self.scale / math.sqrt(H))
        self.down = normal(E, H, I, size=1 / math.sqrt(I))
        self.gate_bias, self.up_bias, self.down_bias = normal(E, I), normal(E, I), normal(E, H)
        self.weights = torch.rand((self.T, self.k), generator=make)
        rows = [torch.randperm(E, generator=make)[: self.k] for _ in range(self.T)]
        if self.k > E:
            rows = [torch.randint(E, (self.k,), generator=make) for _ in range(self.T)]
        self.ids = torch.stack(rows)

    def stored(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's segments in the order in which a checkpoint of this form has them."""
        gate, up, down = self.gate[expert], self.up[expert], self.down[expert]
        bias = [self.gate_bias[expert], self.up_bias[expert]]
        if not self.has_gate:
            gate_up, gate_up_bias = gate, bias[0]
        elif self.interleaved:
            gate_up = torch.empty(2 * self.I, self.H, dtype=self.dtype)
            gate_up[0::2], gate_up[1::2] = gate, up
            gate_up_bias = torch.empty(2 * self.I, dtype=self.dtype)
            gate_up_bias[0::2], gate_up_bias[1::2] = bias
        else:
            gate_up, gate_up_bias = torch.cat([gate, up]), torch.cat(bias)
        if self.transposed:
            gate_up, down = gate_up.t(), down.t()
        segments = {"gate_up": gate_up.contiguous(), "down": down.contiguous()}
        if self.bias:
            segments |= {"gate_up_bias": gate_up_bias, "down_bias": self.down_bias[expert]}
        return segments

    def expected(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] float64, one expert of one token at a time."""
        return self.terms(ids).sum(-1)

    def size(self) -> torch.Tensor:
        """[T, H] float64: how large an output is when its terms do not cancel."""
        return self.terms().square().sum(-1).sqrt()

    def terms(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H, k * (I + 1)] float64: the products whose sum is an output."""
        ids = self.ids if ids is None else ids
        terms = torch.zeros(self.T, self.H, self.k, self.I + 1, dtype=torch.float64)
        for t in range(self.T):
            x = self.hidden[t].double()
            for j in range(self.k):
                e = int(ids[t, j])
                if e >= 0:
                    terms[t, :, j] = float(self.weights[t, j]) * self.expert(e, x)
        return terms.flatten(2)

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """[H, I + 1] float64: what each intermediate value adds, then the bias."""
        gate, up = self.gate[e].double() @ x, self.up[e].double() @ x
        if self.bias:
            gate, up = gate + self.gate_bias[e].double(), up + self.up_bias[e].double()
        pairs = zip(gate.tolist(), up.tolist(), strict=True)
        act = [gate_value(self.form.gate, g, u) for g, u in pairs]
        products = self.down[e].double() * torch.tensor(act, dtype=torch.float64)
        bias = self.down_bias[e].double() if self.bias else torch.zeros(self.H)
        return torch.cat([products, bias[:, None]], 1)

    @property
    def form(self) -> ExpertForm:
        gate = Gate(self.function, self.activation, self.alpha, self.limit)
        return ExpertForm(gate, self.has_gate, self.bias)


class Slots:
    """An arena of `count` slots, all NaN, with every segment a strided view of it."""

    def __init__(self, layer: Layer, count: int) -> None:
        self.layer = layer
        sizes = {name: part.shape for name, part in layer.stored(0).items()}
        offset, places = 0, {}
        for name, shape in sizes.items():
            places[name] = (offset, shape)
            offset += -(-shape.numel() // 16) * 16
        # Longer than its segments, as a slot rounded up to a page is.
        arena = torch.full((count, offset + 48), math.nan, dtype=layer.dtype)
        self.arena = arena.to(DEVICE)
        self.views = {
            name: torch.as_strided(
                self.arena,
                (count, *shape),
                (self.arena.stride(0), *torch.empty(shape).stride()),
                place,
            )
            for name, (place, shape) in places.items()
        }

    def fill(self, slot: int, expert: int) -> None:
        for name, part in self.layer.stored(expert).items():
            self.views[name][slot] = part.to(DEVICE)

    def empty(self, slot: int) -> None:
        self.arena[slot] = math.nan

    def matrices(self) -> ExpertMatrices:
        """The three matrices, as views of the segments."""
        layer, views = self.layer, dict(self.views)
        if layer.transposed:
            views["gate_up"] = views["gate_up"].transpose(1, 2)
            views["down"] = views["down"].transpose(1, 2)
        I, step = layer.I, 2 if layer.interleaved else 1  # noqa: E741

        def part(first: int) -> Matrix:
            rows = slice(first, None, step) if layer.interleaved else slice(first, first + I)
            bias = views["gate_up_bias"][:, rows] if layer.bias else None
            return Matrix(views["gate_up"][:, rows], None, bias, FORMATS[layer.dtype])

        down = Matrix(views["down"], None, views.get("down_bias"), FORMATS[layer.dtype])
        up = part(1 if layer.interleaved else I) if layer.has_gate else None
        return ExpertMatrices(part(0), up, down)

    def weights(self) -> tuple[ExpertMatrices, ExpertForm]:
        return self.matrices(), self.layer.form


def resident(layer: Layer, spare: int = 2, seed: int = 0) -> tuple[Slots, torch.Tensor]:
    """Slots with every expert that `layer.ids` names, at random places, and the map [E] to them."""
    named = sorted({int(e) for e in layer.ids.flatten() if e >= 0})
    slots = Slots(layer, len(named) + spare)
    places = random.Random(seed).sample(range(len(named) + spare), len(named))
    where = torch.full((layer.E,), -1)
    for expert, slot in zip(named, places, strict=True):
        slots.fill(slot, expert)
        where[expert] = slot
    return slots, where.to(DEVICE)


def slot_ids(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    ids = ids.to(DEVICE)
    return torch.where(ids < 0, -1, where[ids.clamp(min=0)])


def error(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """||found - expected|| over the norm of the answer, or of its `size` where terms cancel."""
    if not torch.isfinite(found).all():
        return math.inf
    norm = expected.norm() if size is None else torch.maximum(expected.norm(), size.norm())
    return float((found.cpu().double() - expected).norm() / norm)


def row_error(
    found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None
) -> float:
    """The largest difference in a row, over the root mean square of that row or of all rows."""
    if not torch.isfinite(found).all():
        return math.inf
    difference = (found.cpu().double() - expected).abs().amax(dim=1)
    squares = expected.square().mean(dim=1)
    if size is not None:
        squares = torch.maximum(squares, size.square().mean(dim=1))
    norm = torch.maximum(squares, squares.mean()).sqrt()
    return float(torch.where(difference == 0, 0.0, difference / norm).max())

"""Linear layers whose weight stays packed in memory, as a torch operator and as a module.

    y[t] = weight @ x[t] + bias

A few tokens go through the kernels of the experts, which decode the weight in registers. So a
decode step reads the packed bytes once, and nothing else. For more tokens the weight is decoded
panel by panel, and torch multiplies. Nothing decoded is kept.

The weight is frozen. Gradients of the inputs and of the bias are those of the decoded weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear as torch_linear

from moeinf import _core
from moeinf.checkpoint.formats import (
    FORMATS,
    MULTIPLIER,
    SCALES,
    VALUES,
    ZEROS,
    WeightFormat,
)
from moeinf.checkpoint.layout import lay_out_matrix
from moeinf.errors import UnsupportedError
from moeinf.experts.checks import DTYPES
from moeinf.experts.cpu import core_matrix, default_engine
from moeinf.experts.marks import is_plain_call

PANEL_BYTES = 64 << 20  # of decoded weights at a time

_library = torch.library.Library("moeinf", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, str form) -> Tensor")
_operator = torch.ops.moeinf.packed_linear.default


class PackedForm:
    """How a matrix of `rows` x `cols` lies in `nbytes` bytes of its own."""

    def __init__(self, row: WeightFormat, rows: int, cols: int):
        """Raises ValueError for a matrix that the kernels cannot multiply."""
        self.row, self.rows, self.cols = row, rows, cols
        self.nbytes, self.matrix = lay_out_matrix(row, rows, cols)
        self.core = _core.LinearWeight(core_matrix(self.matrix))
        how = [row.name, row.scales, row.block and "x".join(map(str, row.block))]
        how += ["zeros"] * row.zeros + ["multiplier"] * row.multiplier
        self.name = f"{' '.join(filter(None, how))} [{rows}, {cols}]"

    def __reduce__(self) -> tuple[Any, ...]:
        row = self.row
        how = row.name, row.scales, row.block, row.multiplier, row.zeros
        return _form_of, (*how, self.rows, self.cols)

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """uint8 [nbytes] of the pieces of a matrix."""
        packed = torch.zeros(1, self.nbytes, dtype=torch.uint8)
        for piece, to in self._pieces(packed).items():
            to.copy_(parts[piece].view(to.shape))
        return packed[0]

    def _pieces(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of uint8 [1, nbytes]."""
        view = self.matrix.view(packed)
        pieces = {
            VALUES: view.values,
            SCALES: view.scales,
            ZEROS: view.zeros,
            MULTIPLIER: view.multiplier,
        }
        return {name: piece[0] for name, piece in pieces.items() if piece is not None}

    def decode(
        self, packed: torch.Tensor, dtype: torch.dtype, first: int = 0, count: int | None = None
    ) -> torch.Tensor:
        """[count, cols]: rows of the matrix from row `first` on, all of them without a count."""
        count = self.rows - first if count is None else count
        if packed.is_cpu and dtype in DTYPES:
            out = torch.empty(count, self.cols, dtype=dtype)
            _core.decode(
                default_engine(), DTYPES[dtype], self.core, packed.data_ptr(), first, count,
                out.data_ptr(),
            )  # fmt: skip
            return out
        return self.row.dequantise(self._pieces(packed[None]))[first : first + count].to(dtype)

    def panels(
        self, packed: torch.Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each panel, and its rows decoded."""
        by_rows = packed.is_cpu and dtype in DTYPES
        step = max(1, PANEL_BYTES // (self.cols * dtype.itemsize)) if by_rows else self.rows
        for first in range(0, self.rows, step):
            yield first, self.decode(packed, dtype, first, min(step, self.rows - first))


_forms: dict[str, PackedForm] = {}


@cache
def packed_form(row: WeightFormat, rows: int, cols: int) -> PackedForm:
    """See `PackedForm`. The operator finds it by its name."""
    form = PackedForm(row, rows, cols)
    return _forms.setdefault(form.name, form)


def _form_of(
    name: str,
    scales: str | None,
    block: tuple[int, int] | None,
    multiplier: bool,
    zeros: bool,
    rows: int,
    cols: int,
) -> PackedForm:
    row = FORMATS[name].with_scales(scales, block, multiplier=multiplier, zeros=zeros)
    return packed_form(row, rows, cols)


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: PackedForm
) -> torch.Tensor:
    """Like `torch.nn.functional.linear` with the weight that `packed` holds.

    Args:
        x: [..., K]. Up to sixteen tokens of float32, bfloat16 or float16 on the CPU take the
            kernels of the experts.
        packed: uint8 [form.nbytes], see `PackedForm.pack`.
        bias: [N].

    Returns:
        [..., N].
    """
    if is_plain_call(x, packed):
        return _compute(x, packed, bias, form)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if not torch.compiler.is_compiling() and transformed:
        return torch_linear(x, form.decode(packed, x.dtype), bias)
    return _operator(x, packed, bias, form.name)


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, name: str
) -> torch.Tensor:
    return _compute(x, packed, bias, _forms[name])


def _compute(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: PackedForm
) -> torch.Tensor:
    engine = default_engine()
    found: torch.Tensor | None = _core.packed_linear(engine, x, form.core, packed, bias, None)
    if found is not None:
        return found
    dtype = x.dtype
    columns = x.shape[-1] if x.dim() else 0
    if (
        columns != form.cols
        or not dtype.is_floating_point
        or (bias is not None and (bias.dtype != dtype or bias.shape != (form.rows,)))
    ):  # torch says what does not fit
        weight = form.decode(packed, dtype if dtype.is_floating_point else torch.float32)
        return torch_linear(x, weight, bias)
    if 0 < x.numel() <= _core.LINEAR_TOKENS * columns:  # rows with gaps in them, maybe
        bias = None if bias is None else bias.contiguous()
        found = _core.packed_linear(engine, x.contiguous(), form.core, packed, bias, None)
        if found is not None:
            return found
    out: torch.Tensor | None = None
    for first, weight in form.panels(packed, dtype):
        end = first + len(weight)
        part = torch_linear(x, weight, None if bias is None else bias[first:end])
        if len(weight) == form.rows:
            return part
        out = x.new_empty((*x.shape[:-1], form.rows)) if out is None else out
        out[..., first:end] = part
    assert out is not None
    return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, packed, _, ctx.form = inputs
        ctx.save_for_backward(packed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            for first, weight in _forms[ctx.form].panels(ctx.saved_tensors[0], grad.dtype):
                part = grad[..., first : first + len(weight)] @ weight
                of_x = part if of_x is None else of_x + part
        if ctx.needs_input_grad[2]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, None, of_bias, None


def _differentiated(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: str
) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result: torch.Tensor = _Differentiable.apply(x, packed, bias, form)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(x, packed, bias, form)


def _autocast(
    device: str, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: str
) -> torch.Tensor:
    if x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(device, enabled=False):
        return _operator(x, packed, bias, form)


def _fake(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _forms[form].rows))


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("packed_linear", _packed_linear, "CUDA")
_library.impl("packed_linear", _differentiated, "Autograd")
_library.impl("packed_linear", partial(_autocast, "cpu"), "AutocastCPU")
_library.impl("packed_linear", partial(_autocast, "cuda"), "AutocastCUDA")
torch.library.register_fake("moeinf::packed_linear", _fake, lib=_library)


def refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"{what}: the weight of this layer stays packed, and cannot be replaced or written to: "
        "load the model with dense='decoded'"
    )


class Decoded(torch.Tensor):
    """A weight decoded for its reader. A change to it would change nothing: it is refused."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        in_place = name.endswith("_") and not name.startswith("__")
        if in_place or name in ("__set__", "__setitem__") or name.startswith("__i"):
            refuse(name)
        if isinstance((kwargs or {}).get("out"), cls):
            refuse("out")
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*args, **(kwargs or {}))
            if type(made) is not torch.Tensor or not made.is_cpu:
                return made
            of = next((one for one in args if isinstance(one, cls)), None)
            alias = of is not None and of.untyped_storage().data_ptr() == (
                made.untyped_storage().data_ptr()
            )
        return made.as_subclass(cls) if alias else made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class PackedLinear(torch.nn.Linear):
    """A linear layer with packed bytes in the place of a weight.

    `weight` decodes it at every access. A state_dict has that too, under the name and in the dtype
    of the weight of an ordinary layer. Loading takes back the same numbers, and no others.

    `packed` and `like` are buffers, which move with the layer. `like` has no elements: its dtype is
    that of the weight. A cast changes it, and leaves the bytes as they are.
    """

    packed: torch.Tensor
    like: torch.Tensor
    form: PackedForm

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.form.decode(self.packed, self.like.dtype).as_subclass(Decoded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return packed_linear(x, self.packed, self.bias, self.form)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form.name}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse(name)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        found = state_dict.get(key)
        if found is None:
            missing_keys.append(key)
        elif found.shape != (self.form.rows, self.form.cols) or not torch.equal(
            found.to(self.like), self.weight
        ):
            refuse(key)
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def make_packed(
    layer: torch.nn.Linear, form: PackedForm, packed: torch.Tensor, dtype: torch.dtype
) -> None:
    """Puts packed bytes in the place of the weight of a layer; `dtype` is that of the weight."""
    del layer._parameters["weight"]
    layer.__class__ = PackedLinear
    layer.form = form  # type: ignore[assignment]
    layer.register_buffer("packed", packed, persistent=False)
    layer.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)


def packed_parameters(model: torch.nn.Module) -> int:
    """Weights of all packed layers."""
    layers = (one for one in model.modules() if isinstance(one, PackedLinear))
    return sum(math.prod((one.form.rows, one.form.cols)) for one in layers)

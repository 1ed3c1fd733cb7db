"""Attentions of a few tokens on the CPU: their queries, keys and values in one call.

As modules and operators of torch these are three products, two norms, and about twenty more
operators. The cache of keys and values, the attention itself and what follows stay the model's own
code. An attention is served where its forward has statements that are known here, word by word, and
where a trial gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch

from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.experts.linear import MOST_OF_BF16, MOST_TOKENS, Linear
from moeinf.experts.marks import hooks_everywhere, is_plain_call
from moeinf.experts.packed_linear import PackedLinear
from moeinf.integrations.transformers.attention_forms import (
    LAYERS,
    NAMES,
    NORMS,
    SHAPES,
    TURNS,
    WRITTEN,
    Written,
)
from moeinf.integrations.transformers.norms import same_bits
from moeinf.integrations.transformers.own_source import (
    Function,
    OwnForward,
    is_own,
    served_class,
)

MADE = f"{', '.join(NAMES)} = moeinf_made"
TRIAL = ((1, 1, 1), (3, 1, 3), (1, 3, 1), (2, 2, 1))  # batch, tokens, rows of cos and sin


class _Attention:
    """A base of the classes of attentions that are served."""

    def forward(
        self: Any, hidden_states: Any, position_embeddings: Any = None, *others: Any, **named: Any
    ) -> Any:
        """As the model's own; see `OwnForward`."""
        if (
            type(position_embeddings) is tuple
            and len(position_embeddings) == 2
            and is_plain_call(hidden_states, *position_embeddings)
            and not hooks_everywhere()
            and is_own(self)
        ):
            form = _form(*self.moeinf_attention)
            made = _inputs(form, self, hidden_states, *position_embeddings)
            if made is not None:
                found = self.moeinf_rest(made, hidden_states, position_embeddings, *others, **named)
                if found is not None:
                    return found
        return super().forward(  # type: ignore[misc]
            hidden_states, position_embeddings, *others, **named
        )


def serve_attention(model: torch.nn.Module) -> None:
    """Serves every attention whose statements are known and of which a trial has the same bits.

    Linear layers and norms are served before. Parameters, hooks and names stay.
    """
    known: dict[Any, tuple[Any, ...] | None] = {}
    for module in model.modules():
        split, kind = None, cast(Any, type(module))
        if all(isinstance(getattr(module, layer, None), torch.nn.Linear) for layer in LAYERS):
            split = _split(kind, kind.forward, hasattr(module, NORMS[0]))
        if split is None or (given := _describe(module, split[0])) is None:
            continue
        key = kind, given, _sizes(module)
        if key not in known:
            known[key] = _find(module, given, split[1])
        if (form := known[key]) is not None:
            module.moeinf_attention = form  # type: ignore[assignment]
            module.__class__ = served_class(_Attention, kind, split[2])


@cache
def _split(
    base: type, forward: Function, has_norms: bool
) -> tuple[Written, Function, Function] | None:
    """What is replaced as a function (self, hidden_states, position_embeddings, ...) -> queries,
    keys, values; and the rest, which takes them right after `self`."""
    try:
        own = OwnForward(base)
    except ValueError:
        return None
    if own.parameters[:3] != ["self", "hidden_states", "position_embeddings"]:
        return None
    for written in WRITTEN:
        known = bool(written.norms) == has_norms
        if known and own.find([*SHAPES, *written.statements, *TURNS]) == 0:
            end = len(SHAPES) + len(written.statements) + len(TURNS)
            guard = [f"if {written.unless}: return None"] if written.unless else []
            kept: list[Any] = [*own.body[: len(SHAPES)], *guard, own.body[end - 2], MADE]
            inputs = own.with_body([*own.body[:end], f"return {', '.join(NAMES)}"])
            return written, inputs, own.with_body([*kept, *own.body[end:]], first="moeinf_made")
    return None


def _describe(module: Any, written: Written) -> tuple[Any, ...] | None:
    """The arguments of `_form` that need no trial."""
    layers = [getattr(module, name) for name in LAYERS]
    if any(type(layer) not in (Linear, PackedLinear) for layer in layers):
        return None
    norms = [getattr(module, name, None) for name in NORMS] if written.norms else []
    if any(getattr(norm, "moeinf_norm", None) is None for norm in norms):
        return None
    return (
        tuple(type(layer) for layer in layers),
        tuple(type(norm) for norm in norms),
        written.norms == "row",
        int(module.head_dim),
    )


def _sizes(module: Any) -> Any:
    """What the bits of a trial may depend on beside the classes of the parts."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    forms = [getattr(getattr(module, layer), "form", None) for layer in LAYERS]
    norms = [getattr(getattr(module, norm, None), "moeinf_norm", None) for norm in NORMS]
    shapes = [(name, tuple(one.shape), one.dtype, one.device) for name, one in tensors]
    return (*shapes, *(form and form.name for form in forms), *norms)


@cache
def _form(
    layers: tuple[type, ...],
    norms: tuple[type, ...],
    norms_rows: bool,
    head_dim: int,
    half: bool,
    whole: bool,
    heads_outside: bool,
) -> _core.AttentionForm:
    """Not a part of the module, for modules are copied."""
    return _core.AttentionForm(
        projections=layers,
        packed=[layer is PackedLinear for layer in layers],
        norms=norms or None,
        norms_rows=norms_rows,
        half=half,
        whole=whole,
        heads_outside=heads_outside,
        head_dim=head_dim,
    )


def _inputs(form: Any, module: Any, hidden: Any, cos: Any, sin: Any) -> Any:
    return _core.attention_inputs(
        default_engine(), form, module, hidden, cos, sin, MOST_TOKENS, MOST_OF_BF16
    )


def _find(module: Any, given: tuple[Any, ...], own: Function) -> tuple[Any, ...] | None:
    """The form that has the same bits as the model's own statements, for random tokens, and for
    random numbers in the place of cos and sin, no two of which are alike."""
    width = int(module.head_dim)
    for half, columns in ((False, width), (True, width // 2)):
        trials = [_Trial(module, own, columns)]
        if trials[0].expected is None:
            continue
        part = _Trial(module, own, width // 4 * 2)
        whole = half or part.expected is None
        if not whole:
            trials.append(part)
        for outside in (False, True):
            form = *given, half, whole, outside
            if all(one.is_same(_form(*form)) for one in trials):
                return form
    return None


class _Trial:
    """Random inputs, and what the model's own statements make of them; None: they cannot."""

    def __init__(self, module: Any, own: Function, columns: int):
        self.module = module
        draw = torch.Generator("cpu").manual_seed(0)
        layer = module.q_proj
        like = layer.like if isinstance(layer, PackedLinear) else layer.weight

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32).to(like)

        self.inputs = [
            (random(batch, tokens, layer.in_features), (one, other))
            for batch, tokens, rows in TRIAL
            for one, other in [(random(rows, tokens, columns), random(rows, tokens, columns))]
        ]
        self.expected: list[Any] | None = None
        try:
            with torch.no_grad():
                self.expected = [own(module, *given, attention_mask=None) for given in self.inputs]
        except (TypeError, ValueError, AttributeError, RuntimeError):
            pass

    def is_same(self, form: Any) -> bool:
        """A form may leave calls of more than one token in a row to the model."""
        for given, expected in zip(self.inputs, self.expected or (), strict=True):
            hidden, turns = given
            with torch.no_grad():
                found = _inputs(form, self.module, hidden, *turns)
            if found is None and form.heads_outside and hidden.shape[1] > 1:
                continue
            if found is None or not all(map(_is_same, found, expected)):
                return False
        return True


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also in memory, but for dimensions of one element."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return same_bits(one, other) and all(n == 1 or mine == theirs for n, mine, theirs in strides)

"""MoE blocks of transformers: how a block calls its router, found out by a trial.

The block runs on a few random tokens up to its experts. The child whose output holds the ids that
reach the experts is the router. It must give the same ids when it is called alone; what else it is
given must be the block's own, or the token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeinf.errors import UnsupportedError

TRIAL_TOKENS = 8
INPUT_IDS = object()  # stands for the token ids of the pass


@dataclass(frozen=True)
class Router:
    """The router of one block.

    place: of the ids in its output; None if the block itself chooses from the logits.
    arguments, named: what it takes besides the tokens: names of attributes of the block, None, or
        INPUT_IDS.
    """

    block: Any
    module: Any
    place: int | None
    is_flat: bool  # takes [T, H], not [1, T, H]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def needs_ids(self) -> bool:
        return INPUT_IDS in (*self.arguments, *self.named.values())

    def choose(self, hidden: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The experts [T, k] for hidden [..., H]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        arguments = [self._value(one, input_ids) for one in self.arguments]
        named = {name: self._value(one, input_ids) for name, one in self.named.items()}
        # forward() rather than a call: hooks of others are for what the model computes.
        output = self.module.forward(tokens if self.is_flat else tokens[None], *arguments, **named)
        if self.place is None:
            output = self.block.route_tokens_to_experts(output)
        ids = next(_ids(output)) if self.place is None else output[self.place]
        chosen: torch.Tensor = ids.reshape(len(tokens), -1)
        return chosen

    def _value(self, argument: Any, input_ids: torch.Tensor | None) -> Any:
        if argument is INPUT_IDS:
            return input_ids
        return None if argument is None else getattr(self.block, argument)


@dataclass(frozen=True)
class Trial:
    """What came of running a block: `output` of its router, and what reached the experts."""

    router: Router
    output: Any
    ids: torch.Tensor
    weights: torch.Tensor


def try_router(block: Any) -> Trial:
    """Raises UnsupportedError for a block whose router cannot be called alone."""
    kind = type(block).__name__
    experts = getattr(block, "experts", None)
    if not isinstance(experts, torch.nn.Module):
        raise _unknown(kind, "it has no experts")
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
    hooks = [experts.register_forward_pre_hook(_stop, with_kwargs=True, prepend=True)]
    for child in block.children():
        if child is not experts:
            hooks.append(
                child.register_forward_hook(
                    lambda module, *call: calls.append((module, *call)), with_kwargs=True
                )
            )
    hidden, ids = _tokens(block)
    takes_ids = "input_ids" in inspect.signature(block.forward).parameters
    try:
        with torch.no_grad():
            block(hidden, **({"input_ids": ids} if takes_ids else {}))
        raise _unknown(kind, "it does not call its experts")
    except _Reached as reached:
        chosen, weights = reached.ids, reached.weights
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _unknown(kind, str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    for module, args, kwargs, output in calls:
        places = [
            i
            for i, one in enumerate(output if isinstance(output, tuple) else ())
            if _is_ids(one) and torch.equal(one.reshape(chosen.shape), chosen)
        ]
        chooses = isinstance(output, torch.Tensor) and hasattr(block, "route_tokens_to_experts")
        if not places and not chooses:
            continue
        try:
            router = Router(
                block,
                module,
                places[0] if places else None,
                args[0].dim() == 2,
                tuple(_source(block, one, ids) for one in args[1:]),
                {name: _source(block, one, ids) for name, one in kwargs.items()},
            )
            with torch.no_grad():
                again = router.choose(hidden, ids)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise _unknown(f"{kind}: {type(module).__name__}", str(error)) from error
        if torch.equal(again, chosen):
            return Trial(router, output, chosen, weights)
    raise _unknown(kind, "no part of it gives the ids that reach its experts")


class _Reached(Exception):
    def __init__(self, _: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        self.ids = top_k_index
        self.weights = top_k_weights


def _stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(*args, **kwargs)


def _tokens(block: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [1, T, H] where the block is, in the dtype of most of it, and their ids."""
    largest = max(block.parameters(), key=lambda one: one.numel())
    width = block.experts.config.get_text_config().hidden_size
    draw = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(1, TRIAL_TOKENS, width, generator=draw, dtype=torch.float32, device="cpu")
    ids = torch.arange(TRIAL_TOKENS, device=largest.device)[None]
    return hidden.to(largest.device, largest.dtype), ids


def _source(block: Any, value: Any, ids: torch.Tensor) -> Any:
    """Where an argument of the router comes from. Raises ValueError where that is not known."""
    if value is None:
        return None
    if value is ids:
        return INPUT_IDS
    own = {
        **dict(block.named_parameters(recurse=False)),
        **dict(block.named_buffers(recurse=False)),
    }
    for name, tensor in own.items():
        if tensor is value:
            return name
    raise ValueError(f"expected arguments of its block's own, found {type(value).__name__}")


def _is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _ids(output: Any) -> Any:
    return (one for one in output if _is_ids(one))


def _unknown(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name}: its router cannot be called alone, which prefetch='gate' and recording its "
        f"probabilities need: {why}"
    )

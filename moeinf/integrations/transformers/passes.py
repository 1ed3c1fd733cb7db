"""What a forward pass of a transformers model is: a prompt or a decode step, of which sequences,
and which of its tokens are text.

All of it follows from the inputs of the decoder, the module that runs the layers:

    cache        its length says at which column the new tokens begin; the cache object says which
                 sequences they continue. A length of 0 begins new sequences.
    no cache     a pass whose rows begin with all tokens of an earlier pass runs those again and
                 continues their sequences; another begins new ones.
    packed rows  several sequences in one row: their bounds and positions are given.
    mask         a column that may not see itself is padding.

`generate` adds what only it knows: after the first token that it chooses, passes decode, also where
they check several guesses at once; guesses from the column of the latest token on were wrong; a row
that has met a stopping criterion is at its end. Each beam is a sequence.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache, GenerationMixin, PreTrainedModel, StoppingCriteriaList

from moeinf.cache.passes import Array, ForwardPass, Text
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.whole import NotCopied, class_of

if TYPE_CHECKING:
    from moeinf.cache.cache import ExpertCache
    from moeinf.cache.group import CacheGroup

_logger = logging.getLogger("moeinf.generate")
CACHE_NAMES = ("cache", "past_key_values")  # transformers before 5.24 has the second


class PassReader(NotCopied):
    """Tells the caches of a model of each of its passes, from hooks on its decoder."""

    def __init__(self, decoder: torch.nn.Module, caches: Sequence[ExpertCache | CacheGroup]):
        self._caches = caches
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._by_cache: weakref.WeakKeyDictionary[Any, _Stream] = weakref.WeakKeyDictionary()
        self._callers: weakref.WeakValueDictionary[int, _Stream] = weakref.WeakValueDictionary()
        self._sequences = count()
        self._lock = threading.Lock()  # of the two dictionaries
        self._mine = _OfThread()
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after)

    @contextmanager
    def generation(self, prompt: int | None) -> Iterator[None]:
        """Around `generate`, of a prompt of so many columns."""
        before = self._mine.generation
        self._mine.generation = _Generation(prompt)
        try:
            yield
        finally:
            self._mine.generation = before

    def watched(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The stopping criteria of the `generate` in progress, which learns what they say."""
        if self._mine.generation is None:
            return criteria
        return _WatchedCriteria(criteria, self._mine.generation, self._begin)

    def _begin(self, one: ForwardPass) -> None:
        for cache in self._caches:
            cache.begin_pass(one, said=False)

    @property
    def _is_observed(self) -> bool:
        return any(cache.is_observed for cache in self._caches)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            return
        past = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        mine = self._mine
        mine.unbound = None
        bounds = self._bounds(given, past)
        if bounds is not None:
            one = self._packed(given, past, bounds, tokens.shape[1])
        else:
            one = self._rows(tokens, past, given.get("attention_mask"))
        self._begin(one)

    def _after(self, _: Any, __: Any, output: Any) -> None:
        """A cache that the model itself has made belongs to the sequences of this pass."""
        if torch.compiler.is_compiling() or self._mine.unbound is None:
            return
        parts = output.values() if isinstance(output, Mapping) else output
        if isinstance(output, Mapping | tuple):
            for past in (part for part in parts if isinstance(part, Cache)):
                with self._lock:
                    self._by_cache[past] = self._mine.unbound
                if (one := self._mine.unbound_pass) is not None and one.generation is not None:
                    one.generation.latest = one
        self._mine.unbound = self._mine.unbound_pass = None

    def _rows(self, tokens: torch.Tensor, past: Any, mask: Any) -> ForwardPass:
        """Each row is one sequence."""
        rows, columns = tokens.shape[:2]
        generation = self._mine.generation
        if past is not None:
            begin = earlier = int(past.get_seq_length())
            stream = self._by_cache.get(past)
        else:
            begin = 0
            stream = self._run_again(tokens)
            earlier = 0 if stream is None else stream.tokens.shape[1]
        if stream is None:
            stream = self._new_stream(past)
            if past is None:
                self._mine.unbound = stream
                self._mine.bare.append(stream)
        begins = earlier == 0
        if begins or len(stream.sequences) != rows:
            stream.sequences = [next(self._sequences) for _ in range(rows)]
        stream.tokens = tokens if past is None else None
        prefill = begins or columns - (earlier - begin) > 1
        if generation is not None:
            if generation.caller is None:
                generation.caller = stream.caller
            prefill = begins or not generation.has_chosen
        one = _Rows(
            prefill=prefill,
            new_sequence=begins,
            batch=rows,
            caller=stream.caller,
            names=stream.sequences,
            begin=begin,
            earlier=earlier,
            mask=mask if self._is_observed else None,
            generation=generation,
            is_main=generation is not None and generation.caller == stream.caller,
            ended=None if generation is None else generation.ended,
        )
        if generation is not None and one.is_main:
            generation.latest = None if past is None else one
            self._mine.unbound_pass = one if past is None else None
        return one

    def _run_again(self, tokens: torch.Tensor) -> Any:
        """Without a cache: the stream of which this pass runs all tokens again, and more."""
        mine = self._mine
        for stream in mine.bare:
            old = stream.tokens
            if (
                old is not None
                and old.dim() == tokens.dim()
                and old.shape[0] == tokens.shape[0]
                and old.shape[1] < tokens.shape[1]
            ):
                same = (tokens[:, None, : old.shape[1]] == old[None]).flatten(2).all(-1)
                if bool(same.any(1).all()):  # beams change places
                    return stream
        return None

    def _new_stream(self, past: Any) -> _Stream:
        mine = self._mine
        # Without a cache, those of a generation in progress go on; of others only the latest does.
        mine.bare = [s for s in mine.bare if s.generation is mine.generation is not None]
        with self._lock:
            caller = next(number for number in count(1) if number not in self._callers)
            stream = _Stream(caller, mine.generation)
            self._callers[caller] = stream
            if past is not None:
                self._by_cache[past] = stream
        return stream

    def _bounds(self, given: Mapping[str, Any], past: Any) -> Any:
        """Where sequences begin and end in a packed row; None where each row is one sequence."""
        bounds = given.get("cu_seq_lens_q")
        positions = given.get("position_ids")
        if bounds is not None or not self._is_observed or positions is None:
            return bounds
        if past is not None or given.get("attention_mask") is not None:
            return None
        if positions.dim() != 2 or positions.shape[0] != 1 or positions.shape[1] < 2:
            return None
        starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
        if len(starts) == 0:
            return None
        ends = starts.new_tensor([positions.shape[1]])
        return torch.cat([starts.new_zeros(1), starts, ends])

    def _packed(
        self, given: Mapping[str, Any], past: Any, bounds: torch.Tensor, tokens: int
    ) -> ForwardPass:
        """Continuous batching, or texts one after another in a row.

        A token of continuous batching is written to a place of its own in the paged cache. So the
        sequence to which a token belongs is that of the place that is read before it.
        """
        stream = None if past is None else self._by_cache.get(past)
        begins = stream is None
        if stream is None:
            stream = self._new_stream(past)
        prefill = tokens > len(bounds) - 1
        if not self._is_observed:
            return ForwardPass(prefill=prefill, new_sequence=begins, caller=stream.caller)
        if given.get("block_table") is not None:
            raise UnsupportedError(
                "continuous batching by block table does not say which sequence a token belongs "
                "to, which traces and priors need: expected max_blocks_per_request=0 in its "
                "ContinuousBatchingConfig"
            )
        ends = bounds.tolist()
        places = _first(given.get("write_index"))
        read = _first(given.get("read_index"))
        read_ends = _first(given.get("cu_seq_lens_k"))
        chosen = set(_listed(given.get("logits_indices")))
        positions = _listed(given["position_ids"][0])
        sequences = [-1] * tokens
        text = [-1] * tokens
        decodes = [False] * tokens
        for i, (start, end) in enumerate(pairwise(ends)):
            if start == end:
                continue
            before = positions[start]
            name = None
            if before > 0 and read and read_ends:
                name = stream.by_place.pop(read[read_ends[i] + before - 1], None)
            if name is None:
                name = next(self._sequences)
            if places:
                stream.by_place[places[end - 1]] = name
            here = slice(start, end)
            sequences[here] = [name] * (end - start)
            text[here] = positions[here]
            decodes[here] = [name in stream.decoding] * (end - start)
            if end - 1 in chosen:
                stream.decoding.add(name)
        return _Packed(
            prefill=prefill,
            new_sequence=begins,
            sequences=sequences,
            positions=text,
            caller=stream.caller,
            decodes=decodes,
        )


@dataclass(eq=False)
class _Stream:
    """Sequences that advance together, and the number of their caller.

    It lives as long as its cache; then the number is free for the next one.
    """

    caller: int
    generation: _Generation | None
    sequences: list[int] = field(default_factory=list)  # by row
    tokens: Any = None  # of the latest pass, where no cache keeps them
    by_place: dict[int, int] = field(default_factory=dict)  # sequences by where they end
    decoding: set[int] = field(default_factory=set)  # sequences whose prompt has been read


class _Generation:
    """One run of `generate`."""

    def __init__(self, prompt: int | None):
        self.prompt = prompt  # its columns
        self.has_chosen = False  # a token
        self.columns: int | None = None  # of the text so far
        self.ended: torch.Tensor | None = None  # bool [rows]
        self.caller: int | None = None  # of its first pass
        self.latest: _Rows | None = None  # pass of that caller, where a cache keeps its tokens


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.generation: _Generation | None = None  # the innermost in progress
        self.bare: list[_Stream] = []  # without a cache when they began
        self.unbound: _Stream | None = None  # of the pass in progress, for the cache it makes
        self.unbound_pass: _Rows | None = None  # itself, where `generate` continues it


class _WatchedCriteria(StoppingCriteriaList):
    """Is asked after every token that is chosen.

    It begins the next pass too, for the hooks of a model that is compiled do not run.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        generation: _Generation,
        begin: Callable[[ForwardPass], None],
    ):
        super().__init__(criteria)
        self.generation = generation
        self.begin = begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        one = self.generation
        one.has_chosen = True
        one.columns = columns = input_ids.shape[1]
        if len(done) > 1:
            same = one.ended is not None and len(one.ended) == len(done)
            one.ended = one.ended | done if same else done
        if one.latest is not None:
            self.begin(
                replace(
                    one.latest,
                    prefill=False,
                    new_sequence=False,
                    begin=columns - 1,
                    earlier=columns - 1,
                    mask=None,
                    ended=one.ended,
                )
            )
        return done


@dataclass(frozen=True, eq=False)
class _Rows(ForwardPass):
    """A pass in which every row is one sequence. Positions are columns."""

    names: Sequence[int] = ()
    begin: int = 0  # the column of its first token
    earlier: int = 0  # the column of its first new token
    mask: Any = None
    generation: _Generation | None = None
    is_main: bool = False  # the stream that `generate` continues, not one that guides it
    ended: torch.Tensor | None = None  # rows, before this pass

    def text(self, tokens: int, earlier: int) -> Text:
        rows = len(self.names)
        columns = tokens // rows
        column = self.begin + np.arange(columns)
        prefill = np.full(columns, self.prefill)
        is_text = np.tile(column >= self.earlier, (rows, 1))
        if self.is_main and self.generation is not None:
            if self.generation.prompt is not None:
                prefill &= column < self.generation.prompt
            if self.generation.columns is not None:
                # The token chosen last has not run yet. A guess in its column was a wrong one.
                is_text &= column < self.generation.columns - 1
        if self.ended is not None and len(self.ended) == rows:
            is_text &= ~self.ended.cpu().numpy()[:, None]
        real = _real(self.mask, self.begin, columns)
        if real is not None:
            is_text &= real
        return Text(
            np.repeat(self.names, columns),
            np.where(is_text, column, -1).reshape(-1),
            np.tile(prefill, rows),
        )


@dataclass(frozen=True, eq=False)
class _Packed(ForwardPass):
    decodes: Sequence[bool] = ()

    def text(self, tokens: int, earlier: int) -> Text:
        text = super().text(tokens, earlier)
        return Text(text.sequences, text.positions, ~np.array(self.decodes))


def _real(mask: Any, begin: int, columns: int) -> Array | None:
    """bool [rows or 1, columns]: which tokens of a pass are not padding; None where all are."""
    if isinstance(mask, Mapping):  # by kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        end = begin + columns
        mine = mask[:, begin:end] if mask.shape[1] >= end else mask[:, -columns:]
        return mine.cpu().numpy() != 0
    if mask.dim() != 4 or mask.shape[2] < columns or mask.shape[3] < begin + columns:
        return None
    place = torch.arange(columns, device=mask.device)
    itself = mask[:, 0, place, begin + place].cpu()
    return (itself if itself.dtype == torch.bool else itself == 0).numpy()


def _first(given: Any) -> list[int]:
    """The indices of the first group or kind of attention, on the host."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, list | tuple):
        given = given[0] if given else None
    return _listed(given)


def _listed(tensor: torch.Tensor | None) -> list[int]:
    return [] if tensor is None else tensor.tolist()


class _Generates:
    """Tells the reader of `generate`; a base of the classes of served models."""

    @wraps(GenerationMixin.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("inputs", "input_ids", "inputs_embeds")
        known = [kwargs.get("attention_mask"), *args[:1], *(kwargs.get(name) for name in names)]
        prompt = next((one for one in known if one is not None), None)
        threads = self.moeinf.torch_threads
        if kwargs.get("prompt_lookup_num_tokens") and not self.moeinf.speculation:
            kwargs["prompt_lookup_num_tokens"] = None
            _logger.info(
                "no prompt lookup: `moeinf tune` has found that it costs more than it gains"
            )
        with (
            self.moeinf.passes.generation(None if prompt is None else prompt.shape[1]),
            nullcontext() if threads is None else threads.generation(),
        ):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        return self.moeinf.passes.watched(criteria)


def generating(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of served models of the class `base`."""
    if not issubclass(base, GenerationMixin):
        return base
    return class_of(_Generates, base)

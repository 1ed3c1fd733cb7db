"""A conversation: its messages, their tokens, and the keys and values of the tokens that ran.

A template may render an old answer in another way than it was written: some leave out what a model
thought. So the prompt is compared with the tokens that ran. Where they part, the rest runs again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TextIO

import torch
from transformers import BatchEncoding, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from moeinf.integrations.transformers.generation import Clock, as_chat, continue_prompt

PAST = ALL_CACHE_NAMES[0]  # "past_key_values" before transformers 5.24, "cache" since


@dataclass(frozen=True)
class Answer:
    """One answer and what it took. `run_tokens` of the `prompt_tokens` were not kept from before.

    `ended` is "end" at the model's own end, "length" at the limit, "interrupt" by `interrupt()`.
    """

    text: str
    tokens: list[int]
    ended: str
    prompt_tokens: int
    run_tokens: int
    first_token_seconds: float
    tokens_per_second: float  # after the first token
    hit_rate: float


class Conversation:
    """Answers one message after another. Without a chat template, texts are put one after another.

    `interrupt()` may be called from a signal handler or from another thread.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None):
        refuse_encoder(model)
        self.model = model
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        if system and not self.has_template:
            raise ValueError("a system message needs a chat template, which the tokenizer lacks")
        self.system = [{"role": "system", "content": system}] if system else []
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.ends = end_tokens(model, tokenizer)
        self._interrupt = Interrupt()
        self.reset()

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages: list[dict[str, Any]] = list(self.system)
        self.said: list[int] = []  # the tokens of all messages and answers
        self.ran: list[int] = []  # the tokens whose keys and values are in `past`
        self.past: Any = None

    def interrupt(self) -> None:
        """Ends the answer that is being written."""
        self._interrupt.asked = True

    def answer(
        self,
        message: str,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        stream: TextIO | None = None,
    ) -> Answer:
        """Writes the answer to `stream` as it comes; temperature None is the checkpoint's own.

        Raises:
            ValueError: a message that the template refuses, or that the context has no room for.
                The conversation is as it was before.
        """
        prompt = self._prompt(message)
        room = max_new_tokens if self.context is None else self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and the model's context "
                f"{self.context}: there is no room for an answer"
            )
        kept = self._keep(prompt)
        clock = Clock(self.tokenizer, stream)
        before = self.model.moeinf.stats()
        start = time.perf_counter()
        past, self.past, self.ran = self.past, None, []  # what a pass leaves that fails is unknown
        try:
            tokens = self._run(prompt, past, clock, min(room, max_new_tokens), temperature)
        except Interrupted:
            tokens, self.past, self.ran = [], past, prompt[:kept]
            self._keep(prompt[: kept + 1], broken=True)
        after = self.model.moeinf.stats()
        hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if tokens:
            self.messages += [{"role": "user", "content": message}, self._reply(prompt, tokens)]
        interrupted = self._interrupt.asked and (not tokens or tokens[-1] not in self.ends)
        ended = "end" if tokens and tokens[-1] in self.ends else "length"
        times = clock.times or [start]
        spent = times[-1] - times[0]
        return Answer(
            text=text,
            tokens=tokens,
            ended="interrupt" if interrupted else ended,
            prompt_tokens=len(prompt),
            run_tokens=len(prompt) - kept,
            first_token_seconds=times[0] - start,
            tokens_per_second=(len(tokens) - 1) / spent if spent else 0.0,
            hit_rate=hits / (hits + misses) if hits + misses else 0.0,
        )

    def _prompt(self, message: str) -> list[int]:
        """The tokens of the conversation so far, the message, and what begins an answer."""
        if not self.has_template:
            said = self.said[:-1] if self.said and self.said[-1] in self.ends else self.said
            text = f"\n{message}" if said else message
            return said + list(self.tokenizer(text, add_special_tokens=not said)["input_ids"])
        messages = [*self.messages, {"role": "user", "content": message}]
        return list(as_chat(self.tokenizer, messages)["input_ids"])

    def _reply(self, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        """The answer as a message: what was thought apart from what was said, where the tokenizer
        knows how to tell them apart."""
        if getattr(self.tokenizer, "response_template", None):
            parsed = self.tokenizer.parse_response(tokens, prefix=prompt)
            return {"role": "assistant", "content": "", **parsed}
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"role": "assistant", "content": text}

    def _keep(self, prompt: list[int], *, broken: bool = False) -> int:
        """Forgets keys and values from where the prompt is new; the count of those that stay.

        A pass that was broken off has added to those of the first layers.
        """
        pairs = zip(self.ran, prompt[:-1], strict=False)  # one token at least must run
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if (broken or same < len(self.ran)) and not _cut(self.past, same):
            self.past, same = None, 0
        self.ran = prompt[:same]
        return same

    def _run(
        self,
        prompt: list[int],
        past: Any,
        clock: Clock,
        max_new_tokens: int,
        temperature: float | None,
    ) -> list[int]:
        ids = torch.tensor([prompt])
        with self._interrupt.between_layers(self.model, clock):
            output = continue_prompt(
                self.model,
                BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                streamer=clock,
                stopping_criteria=[self._interrupt],
                eos_token_id=sorted(self.ends) or None,
                return_dict_in_generate=True,
                **({} if past is None else {PAST: past}),
            )
        self.said = output.sequences[0].tolist()
        self.ran = self.said[:-1]  # nothing was asked after the last one
        self.past = getattr(output, PAST, None)
        return self.said[len(prompt) :]


class Interrupted(Exception):
    """A prompt was not read to its end."""


class Interrupt(StoppingCriteria):
    """Ends an answer after the token that is being made; while a prompt is read, after its layer.

    Between two layers nothing is leased and no read is waited for.
    """

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)

    @contextmanager
    def between_layers(self, model: torch.nn.Module, clock: Clock) -> Iterator[None]:
        """Begins an answer: asks before the experts of each layer until it has a token."""

        def check(*_: Any) -> None:
            if self.asked and not clock.times:
                raise Interrupted

        self.asked = False
        experts = [module for module in model.modules() if hasattr(module, "moeinf_cache")]
        handles = [module.register_forward_pre_hook(check) for module in experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def refuse_encoder(model: Any) -> None:
    """Raises ValueError for a model that reads one text apart from the one that it writes."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder, which reads one text and keeps none: "
            "expected a decoder alone for a conversation"
        )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer, as the checkpoint's generation settings and tokenizer say."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _cut(past: Any, length: int) -> bool:
    """Keeps keys and values of the first tokens alone; false where the kind of cache cannot."""
    for layer in getattr(past, "layers", [None]):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return False
        extra = layer.get_seq_length() - length
        if extra > 0:
            try:
                layer.crop(-extra)
            except (ValueError, RuntimeError):  # a window has passed them
                return False
    return True

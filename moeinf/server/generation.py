"""Answers one job: transformers' `generate`, token by token in turn with other jobs."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from moeinf.integrations.transformers.conversation import end_tokens, refuse_encoder
from moeinf.server.job import Chance, Ended, Job, Piece
from moeinf.server.metrics import Metrics
from moeinf.server.text import Detokenizer, StopStrings
from moeinf.server.turns import Turns

LOWEST = -9999.0  # stands for the logarithm of zero, which JSON cannot hold


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Generation:
    """Runs jobs on one model, each in the thread that calls `run`.

    Forward passes take turns. While a prompt is read, its thread also gives way between two layers,
    where nothing is leased: a long prompt holds up the tokens of others by one layer, not by all.
    A job never shares a pass with another, so its tokens are those that it would have alone.
    """

    def __init__(self, model: Any, tokenizer: Any, metrics: Metrics):
        refuse_encoder(model)
        self._model = model
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._device = model.moeinf.cache.device
        self._ends = end_tokens(model, tokenizer)
        if model.generation_config.pad_token_id is None:  # generate would warn in each call
            model.generation_config.pad_token_id = min(self._ends, default=0)
        self._turns = Turns(self._device)
        self._mine = threading.local()
        for module in model.modules():
            if hasattr(module, "moeinf_cache"):
                module.register_forward_pre_hook(self._between_layers)

    def run(self, job: Job) -> None:
        """Writes the answer to `job.send`; returns early once the job is cancelled."""
        writer = self._mine.writer = _Writer(
            job, self._tokenizer, self._ends, self._turns, self._metrics
        )
        ids = torch.tensor([job.prompt], device=self._device)
        try:
            with self._turns.turn(job.seed), torch.inference_mode():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=job.max_new_tokens,
                    logits_processor=[] if job.top_logprobs is None else [writer.chances],
                    stopping_criteria=[writer],
                    eos_token_id=sorted(self._ends) or None,
                    num_beams=1,
                    **job.sampling,
                )
        except Cancelled:
            pass
        finally:
            self._mine.writer = None
        self._metrics.answered(len(job.prompt), writer.new_tokens, cancelled=job.cancelled)
        if not job.cancelled:
            writer.finish()

    def _between_layers(self, *_: Any) -> None:
        writer = getattr(self._mine, "writer", None)
        if writer is None:
            return
        if writer.job.cancelled:
            raise Cancelled
        if not writer.new_tokens:
            self._turns.hand_over()


class _Chances(LogitsProcessor):
    """Keeps the log-probabilities of the model itself, before temperature and top_p."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any) -> Any:
        self.logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int, top: int, offset: int) -> Chance:
        best = torch.topk(self.logprobs, top)
        values = [max(value, LOWEST) for value in best.values.tolist()]
        return Chance(
            token=token,
            logprob=max(float(self.logprobs[token]), LOWEST),
            likeliest=list(zip(best.indices.tolist(), values, strict=True)),
            offset=offset,
        )


class _Writer(StoppingCriteria):
    """Sends each token's text, and says when to stop; asked by `generate` after every token."""

    def __init__(self, job: Job, tokenizer: Any, ends: set[int], turns: Turns, metrics: Metrics):
        self.job = job
        self.chances = _Chances()
        self.new_tokens = 0
        self._ends = ends
        self._turns = turns
        self._metrics = metrics
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(job.stops)
        self._ended = False
        self._known = self._sent = 0  # characters
        self._pending: list[Chance] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        self._take(int(input_ids[0, -1]))
        self._turns.hand_over()
        ends = self._stops.met or self.job.cancelled
        return torch.full((1,), ends, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Sends what was held back, and the end."""
        if not self._stops.met:
            text = self._stops.add(self._text.rest())
            self._send(text + self._stops.rest(), last=not self._stops.met)
        stopped = self._ended or self._stops.met
        self.job.send(Ended("stop" if stopped else "length", self.new_tokens))

    def _take(self, token: int) -> None:
        self.new_tokens += 1
        self._metrics.token(self.job, first=self.new_tokens == 1)
        if token in self._ends:
            self._ended = True
            return
        offset = self._known
        text = self._text.add(token)
        self._known += len(text)
        if self.job.top_logprobs is not None:
            self._pending.append(self.chances.of(token, self.job.top_logprobs, offset))
        self._send(self._stops.add(text))

    def _send(self, text: str, *, last: bool = False) -> None:
        """With the text go its tokens: those that begin in it, and at the end all."""
        self._sent += len(text)
        count = sum(one.offset < self._sent or last for one in self._pending)
        chances, self._pending = self._pending[:count], self._pending[count:]
        if text or chances:
            self.job.send(Piece(text, chances))

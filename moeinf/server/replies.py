"""Answers in OpenAI's shape, whole and in the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from moeinf.server.job import Chance

END_OF_STREAM = b"data: [DONE]\n\n"


def as_event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


class Reply(ABC):
    """The answer to one request. A subclass says how text and log-probabilities lie in it."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, tokenizer: Any, model: str, fingerprint: str):
        self._tokenizer = tokenizer
        self._fields = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(
        self, text: str, chances: Sequence[Chance] | None, reason: str, usage: dict[str, int]
    ) -> dict[str, Any]:
        """The one document of an answer that is not streamed."""
        choice = self._choice(self._message(text), chances, reason)
        return {**self._fields, "object": self.whole_object, "choices": [choice], "usage": usage}

    def begin(self) -> dict[str, Any] | None:
        """What comes before the text of a stream."""
        return None

    def chunk(
        self, text: str, chances: Sequence[Chance] | None, reason: str | None
    ) -> dict[str, Any]:
        return self._chunk([self._choice(self._delta(text), chances, reason)])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last of a stream whose client asked for it."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._fields, "object": self.chunk_object, "choices": choices}

    def _choice(
        self, content: dict[str, Any], chances: Sequence[Chance] | None, reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if chances is None else self._logprobs(chances)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    @abstractmethod
    def _logprobs(self, chances: Sequence[Chance]) -> dict[str, Any]:
        """The chances of the tokens of a text."""


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _logprobs(self, chances: Sequence[Chance]) -> dict[str, Any]:
        return {
            "tokens": [self._token(one.token) for one in chances],
            "token_logprobs": [one.logprob for one in chances],
            "top_logprobs": [
                {self._token(token): logprob for token, logprob in reversed(one.likeliest)}
                for one in chances
            ],
            "text_offset": [one.offset for one in chances],
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def begin(self) -> dict[str, Any]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return self._chunk([self._choice(delta, None, None)])

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, chances: Sequence[Chance]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._entry(one.token, one.logprob),
                    "top_logprobs": [self._entry(*likely) for likely in one.likeliest],
                }
                for one in chances
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token that is a part of a character has no bytes here."""
        text = self._token(token)
        parts = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": parts}

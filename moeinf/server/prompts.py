"""From what a client sends to the tokens of a prompt, within the limits."""

from __future__ import annotations

from typing import Any

from moeinf.integrations.transformers.generation import as_chat
from moeinf.server.errors import Refused
from moeinf.server.requests import ChatRequest, CompletionRequest
from moeinf.server.settings import Settings


class Prompts:
    """Encodes prompts for one model. Not thread-safe: the application calls it in one thread."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings):
        config = model.config.get_text_config()
        self.tokenizer = tokenizer
        self._settings = settings
        self._vocabulary = config.vocab_size
        self._context: int | None = getattr(config, "max_position_embeddings", None)

    def of_text(self, asked: CompletionRequest) -> list[int]:
        """The tokens of a completion's prompt, which may be tokens already."""
        prompt = asked.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._checked(self._encode(prompt, "prompt"), "prompt")
        ids = [int(token) for token in prompt]
        if max(ids, default=0) >= self._vocabulary:
            raise Refused(
                400,
                f"prompt: expected tokens below {self._vocabulary}, found {max(ids)}",
                param="prompt",
            )
        return self._checked(ids, "prompt")

    def of_messages(self, asked: ChatRequest) -> list[int]:
        """The tokens of a conversation. Without a chat template, texts one after another."""
        messages = [message.for_template() for message in asked.messages]
        for message in messages:
            _check_is_text(message["content"], "messages")
        if self.tokenizer.chat_template:
            try:
                ids = as_chat(self.tokenizer, messages)["input_ids"]
            except ValueError as error:
                raise Refused(400, f"messages: {error}", param="messages") from error
        elif any(message["role"] == "system" for message in messages):
            why = "messages: a system message needs a chat template, which the tokenizer lacks"
            raise Refused(400, why, param="messages")
        else:
            text = "\n".join(message["content"] for message in messages)
            ids = self._encode(text, "messages")
        return self._checked(ids, "messages")

    def _encode(self, text: str, param: str) -> Any:
        _check_is_text(text, param)
        return self.tokenizer(text)["input_ids"] if text else []

    def room(self, ids: list[int], asked: int | None) -> int:
        """How many tokens may be written after these."""
        most = self._settings.new_tokens
        if asked is not None and asked > most:
            raise Refused(
                400,
                f"max_tokens: this server writes at most {most} tokens, found {asked}",
                param="max_tokens",
            )
        if self._context is None:
            return asked or most
        left = self._context - len(ids)
        if left < (asked or 1):
            raise Refused(
                400,
                f"the model's context has {self._context} tokens, the prompt {len(ids)}, and "
                f"{asked or 1} more were asked for",
                param="max_tokens" if left > 0 else None,
                code="context_length_exceeded",
            )
        return asked or min(most, left)

    def _checked(self, ids: Any, param: str) -> list[int]:
        if not ids:
            raise Refused(400, f"{param}: expected text, found none", param=param)
        if len(ids) > self._settings.prompt_tokens:
            raise Refused(
                400,
                f"{param}: this server reads at most {self._settings.prompt_tokens} tokens, found "
                f"{len(ids)}",
                param=param,
                code="context_length_exceeded",
            )
        return list(ids)


def _check_is_text(text: str, param: str) -> None:
    """JSON can say halves of characters, which a tokenizer does not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"{param}: expected text in Unicode: {error}", param=param) from None

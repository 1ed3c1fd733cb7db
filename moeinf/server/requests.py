"""What a client may ask for. What is unknown or not done here is refused by its name.

A parameter whose only value here is the one that changes nothing is accepted with that value alone
(`NEUTRAL`). One that cannot change an answer of this server is accepted and ignored (`IGNORED`).
null stands for the default everywhere, as clients send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moeinf.server.errors import Refused

MOST_STOPS = 4
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "store": (False,),
}
IGNORED = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
    "parallel_tool_calls",
}
# Of a message that a client had from a server and sends back; empty in every answer from here.
EMPTY_IN_MESSAGES = {
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "tool_calls",
    "reasoning_content",
}


class _Strict(BaseModel):
    """No text is taken for a number. Other keys are kept, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Common(_Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def refuse_unknown(self) -> None:
        """Raises Refused for a parameter that this server does not know or cannot follow."""
        _refuse_unknown(self.model_extra, NEUTRAL)
        if self.stream_options is not None:
            _refuse_unknown(self.stream_options.model_extra, {}, "stream_options.")
            if not self.stream:
                raise Refused(400, "stream_options needs stream=true", param="stream_options")


TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: str | list[TokenId] | Annotated[list[str], Field(max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)

    def limit(self) -> int | None:
        """OpenAI's default is 16 tokens."""
        return self.max_tokens or 16

    def top_logprobs_asked(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """A template knows no developer, OpenAI's newer name of system."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.text(), **named}


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def top_logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unknown(self) -> None:
        super().refuse_unknown()
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        empty: dict[str, tuple[Any, ...]] = dict.fromkeys(EMPTY_IN_MESSAGES, ("", []))
        for place, message in enumerate(self.messages):
            _refuse_unknown(message.model_extra, empty, f"messages.{place}.")
            for part in message.content if isinstance(message.content, list) else ():
                _refuse_unknown(part.model_extra, {}, f"messages.{place}.content.")


def _refuse_unknown(
    extra: dict[str, Any] | None, neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> None:
    for name, value in (extra or {}).items():
        if value is None or (name in IGNORED and not where):
            continue
        if name not in neutral:
            raise Refused(
                400,
                f"{where}{name:.100}: this server knows no such parameter",
                param=f"{where}{name:.100}",
                code="unknown_parameter",
            )
        if not any(value == one and type(value) in _types_of(one) for one in neutral[name]):
            allowed = " or ".join(map(repr, neutral[name]))
            raise Refused(
                400,
                f"{where}{name}: this server does nothing but {allowed}, found {value!r:.100}",
                param=f"{where}{name}",
                code="unsupported_value",
            )


def _types_of(value: Any) -> tuple[type, ...]:
    """0.0 is as good as 0; false is not."""
    return (int, float) if type(value) is int else (type(value),)


def in_words(errors: Any) -> Refused:
    """One of pydantic's errors as the answer to the client.

    A value that may be of several types has an error for each. One about the value itself says
    more than those about types.
    """
    first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
    param = ".".join(_place(first["loc"]))[:200] or None
    found = first.get("input")
    shown = "" if first["type"] in ("missing", "json_invalid") else f", found {found!r:.100}"
    return Refused(400, f"{param or 'body'}: {first['msg']}{shown}", param=param)


def _place(parts: tuple[Any, ...]) -> list[str]:
    """Without the names of types, by which pydantic tells apart the errors of several."""
    named = [str(part) for part in parts if part not in ("body", "str")]
    return [part for part in named if "[" not in part and "-" not in part]

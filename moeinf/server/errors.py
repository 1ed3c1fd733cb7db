"""The one exception of the server, and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that gets an error instead of an answer.

    `param` names the parameter that is wrong; `code` is for programs, such as
    "context_length_exceeded".
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(_utf8(message))
        self.status = status
        self.param = param and _utf8(param)
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON document of the error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """What tells a client when to come again, or how to say who it is."""
        if self.status in (429, 503):
            return {"Retry-After": "1"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def _utf8(text: str) -> str:
    """JSON can say halves of characters, which no encoding can."""
    return text.encode("utf-8", "backslashreplace").decode()

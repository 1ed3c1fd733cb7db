"""Tokens become text piece by piece; text that may still be cut off waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what a decoder writes for a part of a character


class Detokenizer:
    """The text of tokens as they come. A token that ends within a character waits for the rest.

        tokens   [ already text | text before the next | new ]
                 0              begin                  end

    A tokenizer may write a token in another way at the beginning of a text, so the tokens from
    `begin` on are decoded with the new ones and again without them.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = self._end = 0

    def add(self, token: int) -> str:
        """The text that the token completes."""
        self._tokens.append(token)
        return self._new_text(even_incomplete=False)

    def rest(self) -> str:
        """The text of tokens that have waited in vain."""
        return self._new_text(even_incomplete=True)

    def _new_text(self, *, even_incomplete: bool) -> str:
        known = self._decode(self._tokens[self._begin : self._end])
        whole = self._decode(self._tokens[self._begin :])
        if whole.endswith(INCOMPLETE) and not even_incomplete:
            return ""
        self._begin, self._end = self._end, len(self._tokens)
        return whole[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class StopStrings:
    """Text up to the first of the given strings. What may be the beginning of one waits."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        """The text that is certain by now; `met` says whether it is the last."""
        held = self._held + text
        found = [place for one in self._strings if (place := held.find(one)) >= 0]
        if found:
            self.met, self._held = True, ""
            return held[: min(found)]
        longest = max(map(len, self._strings), default=1) - 1
        waits = next(
            (
                size
                for size in range(min(longest, len(held)), 0, -1)
                if any(one.startswith(held[-size:]) for one in self._strings)
            ),
            0,
        )
        self._held = held[len(held) - waits :]
        return held[: len(held) - waits]

    def rest(self) -> str:
        """What has waited in vain, at the end of the text."""
        held, self._held = self._held, ""
        return held

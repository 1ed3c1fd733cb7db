"""Shares of a count, as users write them: "25%"."""

from __future__ import annotations


def share_of(text: str, total: int, *, most: float = 100) -> int:
    """`"25%"` of `total`, to the nearest count, half up; it may be 0.

    Raises ValueError unless `text` is a share above 0% and up to `most` percent.
    """
    stripped = text.strip()
    try:
        percent = float(stripped.removesuffix("%")) if stripped.endswith("%") else float("nan")
    except ValueError:
        percent = float("nan")
    if not 0 < percent <= most:
        raise ValueError(f"{text!r} is not a share above 0% and up to {most:.0f}%")
    return int(total * percent / 100 + 0.5)

"""What a runtime's user can say of the cache, as JSON."""

from __future__ import annotations

from typing import Any

OPTIONS = ("memory", "slots", "policy", "prefetch", "host_memory", "reader_threads")


def checked(found: Any, where: str) -> dict[str, Any]:
    """The options themselves. ValueError for what nobody knows."""
    if not isinstance(found, dict) or set(found) - set(OPTIONS):
        raise ValueError(f"moeinf in {where}: expected {', '.join(OPTIONS)}, {found=}")
    return found

"""The versions of a runtime that a plugin serves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(*packages: str) -> tuple[int, ...]:
    """Major, minor and patch of the first of these packages that is installed; else zeros."""
    for name in packages:
        try:
            numbers = [int(part) for part in version(name).split("+")[0].split(".")[:3]]
        except (PackageNotFoundError, ValueError):
            continue
        return tuple(numbers)
    return 0, 0, 0


def refusal(
    runtime: str, first: tuple[int, ...], last: tuple[int, ...], found: tuple[int, ...], advice: str
) -> str:
    """One sentence: which versions are served, which one is here, and the way to run it."""
    served = " to ".join(dict.fromkeys(".".join(map(str, one)) for one in (first, last)))
    return f"moeinf serves {runtime} {served}, this is {'.'.join(map(str, found))}: {advice}"

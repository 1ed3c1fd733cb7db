"""Refuses a configuration for moeinf where it cannot be followed."""

from __future__ import annotations

from moeinf.errors import UnsupportedError


def install(reason: str) -> None:
    """Every `VllmConfig` that speaks of moeinf raises UnsupportedError."""
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if hasattr(original, "refuses_moeinf"):
        return

    def refuse(self: VllmConfig) -> None:
        if isinstance(self.additional_config, dict) and "moeinf" in self.additional_config:
            raise UnsupportedError(reason)
        original(self)

    refuse.refuses_moeinf = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = refuse

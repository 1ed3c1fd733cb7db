"""SGLang's plugin: experts out of an `ExpertCache` in place of SGLang's own.

    MOEINF_SGLANG='{"memory": "25%"}' python -m sglang.launch_server --model-path MODEL

SGLang calls `register` in each of its processes. Nothing happens without that variable.
"""

from __future__ import annotations

import os

from moeinf.integrations.versions import refusal, version_of

VARIABLE = "MOEINF_SGLANG"
FIRST, LAST = (0, 5, 23), (0, 5, 23)


def register() -> None:
    """Called by SGLang's entry point `sglang.srt.plugins`, maybe more than once.

    SGLang logs the exception of a plugin and goes on without it: with all experts in memory. So
    whatever keeps this plugin from its work ends the process.
    """
    if VARIABLE not in os.environ:
        return
    found = version_of("sglang")
    if not FIRST <= found <= LAST:
        raise SystemExit(refusal("SGLang", FIRST, LAST, found, f"unset {VARIABLE}"))
    try:
        from moeinf.integrations.sglang import experts

        experts.install(os.environ[VARIABLE])
    except Exception as error:
        raise SystemExit(f"moeinf: {error}") from error

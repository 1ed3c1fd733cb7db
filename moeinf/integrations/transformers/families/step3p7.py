"""Step 3.7: as in the interface, but for what the interface says of a module."""

from __future__ import annotations

from typing import Any

from moeinf.integrations.transformers.families.adapter import Experts


class Step3p7(Experts):
    def __init__(self, old: Any, config: Any):
        super().__init__(
            config, old.act_fn, (old.num_experts, old.intermediate_dim, old.hidden_dim)
        )
        self.limit = old.limit
        self._apply_gate = old._apply_gate  # type: ignore[method-assign]

"""Random traces with the shapes real ones have: few experts, skewed, with prompts and gaps."""

from __future__ import annotations

import numpy as np

from moeinf.traces.trace import Trace


def random_trace(
    seed: int,
    *,
    layers: int = 5,
    num_experts: int = 11,
    k: int = 3,
    sequences: int = 4,
    prompt: int = 6,
    decode: int = 25,
) -> Trace:
    """Skewed, persistent routing; some prompts are missing, some routes are -1."""
    rng = np.random.default_rng(seed)
    popularity = rng.gumbel(size=(layers, num_experts))
    mood = np.zeros((layers, num_experts))
    experts, sequence, phase = [], [], []
    for number in range(sequences):
        tokens = [0] * int(rng.integers(0, prompt + 1)) + [1] * int(rng.integers(1, decode + 1))
        for is_decode in tokens:
            mood = 0.7 * mood + rng.gumbel(size=mood.shape)
            chosen = np.argsort(-(popularity + mood), axis=1)[:, :k].astype(np.int16)
            chosen[rng.random(chosen.shape) < 0.03] = -1
            experts.append(chosen)
            sequence.append(number * 2)
            phase.append(is_decode)
    return Trace(
        experts=np.stack(experts),
        sequence=np.array(sequence, np.int32),
        phase=np.array(phase, np.uint8),
        num_experts=num_experts,
        name=f"random-{seed}",
    )

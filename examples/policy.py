"""Your own policy in two ways: priors for the live cache's policy, or a whole policy to simulate.

python examples/policy.py [TRACE]      # without a trace file: a random trace
"""

import sys

import numpy as np

import moeinf


class MyPriors:
    """Sees the routing once per token and returns how likely each expert is to return soon."""

    def __init__(self, trace: moeinf.Trace) -> None:
        self.heat = np.zeros((trace.num_layers, trace.num_experts))

    def observe(self, experts: np.ndarray, new_sequence: bool) -> np.ndarray:
        self.heat *= 0.5 if new_sequence else 0.9
        for layer, routed in enumerate(experts.transpose(1, 0, 2)):
            self.heat[layer, routed[routed >= 0]] += 0.1
        return self.heat


class MyPolicy:
    """Evicts the lowest score: here the oldest use, but early layers count as younger."""

    def __init__(self, trace: moeinf.Trace) -> None:
        self.last_use = np.zeros(trace.total_experts)
        self.bonus = np.repeat(np.linspace(20, 0, trace.num_layers), trace.num_experts)

    def observe(self, step) -> None:
        self.last_use[step.experts] = step.index

    def score(self, residents: np.ndarray) -> np.ndarray:
        return self.last_use[residents] + self.bonus[residents]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        trace = moeinf.Trace.load(sys.argv[1])
    else:
        skewed = np.random.default_rng(0).zipf(1.5, size=(300, 8, 3)) % 16
        trace = moeinf.Trace.from_arrays(skewed, num_experts=16)
    for result in (
        moeinf.simulate(trace, slots="20%", policy="lru"),
        moeinf.simulate(trace, slots="20%", policy=MyPolicy(trace)),
        moeinf.simulate(trace, slots="20%", policy="learned"),
        moeinf.simulate(trace, slots="20%", policy="learned", priors=MyPriors(trace)),
    ):
        print(f"{result.policy:10} {result.hit_rate_decode:.1%} of decode accesses hit")

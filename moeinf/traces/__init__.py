"""Recorded routing: traces, the simulator, activation matrices, priors hooks."""

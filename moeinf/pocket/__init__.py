"""The built-in model: a small Mixture-of-Experts language model that writes Python-like text."""

from pathlib import Path

POCKET = Path(__file__).parent

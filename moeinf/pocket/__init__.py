"""The built-in model: a small Mixture-of-Experts language model that writes Python-like text."""

from pathlib import Path

POCKET = Path(__file__).parent


def model_name(checkpoint: Path) -> str:
    """What a trace calls the model: its folder's name, not where it lies on this machine."""
    folder = checkpoint.resolve()
    return "moeinf's built-in model" if folder == POCKET.resolve() else folder.name

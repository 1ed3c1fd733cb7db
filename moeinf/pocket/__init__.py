"""The built-in model: a small Mixture-of-Experts language model that writes Python-like text."""

from pathlib import Path

POCKET = Path(__file__).parent


def model_name(checkpoint: Path) -> str:
    """The name of a model in a trace: that on the Hub, or its folder's without the path."""
    if not checkpoint.is_dir():
        return str(checkpoint)
    folder = checkpoint.resolve()
    return "moeinf's built-in model" if folder == POCKET.resolve() else folder.name

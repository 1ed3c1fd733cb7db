"""Runs transformers models with their experts in a cache; importing it registers 'moeinf'."""

try:
    import transformers.integrations.moe  # noqa: F401  # there since transformers 5
except ImportError as error:
    raise ImportError("moeinf.load needs transformers >= 5: pip install 'moeinf[hf]'") from error

from moeinf.integrations.transformers.load import ServedExperts, load

__all__ = ["ServedExperts", "load"]

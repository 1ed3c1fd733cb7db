"""Runs transformers models with their experts in a cache; importing it registers 'moeinf'."""

from moeinf.integrations.transformers.load import ServedExperts, load

__all__ = ["ServedExperts", "load"]

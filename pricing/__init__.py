"""Prices any product with a saved system: `from pricing import PriceModel`."""

from pricing.model import PriceModel

__all__ = ["PriceModel"]

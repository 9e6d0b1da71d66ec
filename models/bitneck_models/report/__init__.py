"""Measured results as tables and curves."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)

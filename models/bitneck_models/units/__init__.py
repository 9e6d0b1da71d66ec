"""Bottleneck units: geometry, layers, topologies, the unit itself, where its training starts, and pruning."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)

"""Bottleneck units: geometry, layers, topologies, the unit itself, where its training starts, and pruning."""

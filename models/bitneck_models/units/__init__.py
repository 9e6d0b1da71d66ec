"""Bottleneck units: geometry, layers, topologies, and where their training begins."""

"""Backbones: frozen task networks as ordered lists of named stages, with split points between them."""

"""Measurements of bundles and of what they are compared with."""

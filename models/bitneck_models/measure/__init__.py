"""Measurements of bundles, and of the baselines that they are compared with."""

"""Measurements: what a frame costs this device, and how a server answers many sessions."""

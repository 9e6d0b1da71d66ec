"""The command line ``bitneck-edge``."""

from bitneck_edge.cli.main import app, main

__all__ = ["app", "main"]

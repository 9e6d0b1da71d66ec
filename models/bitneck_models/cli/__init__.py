"""The command line ``bitneck-models``."""

from bitneck_models.cli.main import app, main

__all__ = ["app", "main"]

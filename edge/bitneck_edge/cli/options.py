"""Flags that several commands have."""

from typing import Annotated

import typer

__all__ = ["ACCESS", "Csv", "Json"]

ACCESS = ("server", "model", "tls", "tls_ca", "tls_cert", "tls_key", "insecure", "token", "cache_dir")
"""Settings of every command that asks a server for its bundle."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values on stdout, with a line of names.")]

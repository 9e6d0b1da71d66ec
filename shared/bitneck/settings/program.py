"""What the three command lines have in common: ``--version``, and how errors end a program."""

import io
import os
import sys
from typing import Annotated

import typer

import bitneck
from bitneck.errors import BitneckError

__all__ = ["make_app", "run_app"]


def make_app(text: str) -> typer.Typer:
    """A command line with ``--version`` and shell completion.

    Args:
        text: what the program does.
    """
    app = typer.Typer(help=text, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
        if version:
            print(bitneck.__version__)  # noqa: T201
            raise typer.Exit

    return app


def run_app(app: typer.Typer) -> None:
    """Run a command line. A `BitneckError` becomes one line on stderr and its exit code.

    Stdout may be closed by its reader, and names of files need not be text: neither gives a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except BitneckError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

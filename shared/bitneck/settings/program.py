"""What the three command lines have in common: ``--version``, and how errors end a program."""

import contextlib
import io
import os
import signal
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

    Stdout may be closed by its reader or its disk full, a file may not be writable, names of files need not be text,
    and the user may interrupt: none of these gives a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BitneckError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as exc:
        _drop_output()
        where = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else "output"
        print(f"error: {where}: {exc.strerror or exc}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        _drop_output()
        sys.exit(128 + signal.SIGINT)


def _drop_output() -> None:
    """What is still to be written goes nowhere: the interpreter would fail on it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""What the three command lines have in common: ``--version``, and how errors end a program."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from typing import Annotated

import typer

import bitneck
from bitneck.errors import BitneckError

__all__ = ["END_S", "make_app", "run_app"]

END_S = 2.8
"""Seconds after a signal at which a device's program ends, whatever it does: within three."""


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


def run_app(app: typer.Typer, *, end_s: float | None = None) -> None:
    """Run a command line. A `BitneckError` becomes one line on stderr and its exit code.

    Stdout may be closed by its reader or its disk full, a file may not be writable, names of files need not be text,
    and the user may interrupt: none of these gives a traceback.

    Args:
        app: the command line.
        end_s: seconds after Ctrl-C at which the process ends whatever it does; None waits for it.
    """
    if end_s is not None:
        _end_after_interrupt(end_s)
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


def _end_after_interrupt(seconds: float) -> None:
    """End the process some time after an interrupt, even if its main thread computes and sees no signal.

    Python's own handler runs between two instructions of the main thread. The byte that it writes comes at once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    except ValueError:  # not the main thread: whoever runs it there has its own way
        return

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                time.sleep(seconds)
                os._exit(128 + number[0])

    threading.Thread(target=wait, name="bitneck-interrupt", daemon=True).start()


def _drop_output() -> None:
    """What is still to be written goes nowhere: the interpreter would fail on it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

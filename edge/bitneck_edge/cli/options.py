"""Flags that several commands have."""

import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, get_args

import typer

from bitneck_edge.settings import EdgeSettings

__all__ = ["ACCESS", "CLIENT", "Csv", "Json", "accepting"]

ACCESS = ("server", "model", "tls", "tls_ca", "tls_cert", "tls_key", "insecure", "token", "cache_dir")
"""Settings of every command that asks a server for its bundle."""
CLIENT = tuple(name for name in EdgeSettings.model_fields if name != "bundle")
"""Settings of a client: all of them."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values on stdout, with a line of names.")]


def accepting(other: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take the flags of another one, too, so that a user need not sort them out.

    Those that it has not itself have no effect, and its help does not show them.

    Args:
        other: a command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        more = [
            parameter.replace(annotation=_hidden(parameter.annotation))
            for name, parameter in inspect.signature(other, eval_str=True).parameters.items()
            if name not in signature.parameters
        ]

        @functools.wraps(command)
        def run(*args: Any, **values: Any) -> None:
            command(*args, **{name: value for name, value in values.items() if name in signature.parameters})

        parameters = [*signature.parameters.values(), *more]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _hidden(annotation: Any) -> Any:
    """The annotation of a flag that the help does not show."""
    kind, option = get_args(annotation)
    hidden = copy(option)
    hidden.hidden = True
    return Annotated[kind, hidden]

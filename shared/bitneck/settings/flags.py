"""Flags of the command lines, made from the settings models.

    @app.command()
    @with_settings(EdgeSettings, "server", "token")
    def points(*, settings: EdgeSettings, as_json: Json = False) -> None: ...

`bitneck-edge points` then has ``--server``, ``--token`` and ``--config``, with the texts, groups and defaults of the
model, and the command gets the settings that flags, environment, file and defaults give together.
"""

import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from rich.markup import escape

from bitneck.settings.model import Settings

__all__ = ["default_text", "group_of", "with_settings"]


def with_settings(model: type[Settings], *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of some settings.

    Args:
        model: the settings.
        names: settings that have an effect in this command, in the order of the help.

    Returns:
        A decorator for a command that takes ``settings`` by keyword, and, if it wants, ``origins``: where each of them
        came from, as `Settings.load_with_origins` gives it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [
            parameter for parameter in signature.parameters.values() if parameter.name not in ("settings", "origins")
        ]
        flags = [_parameter(model, name) for name in names]

        @functools.wraps(command)
        def run(*args: Any, config: Path | None, **values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            given = {name: None if value == [] else value for name, value in given.items()}
            settings, origins = model.load_with_origins(given, config, flags=True)
            if "origins" in signature.parameters:
                values["origins"] = origins
            command(*args, settings=settings, **values)

        config = inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(help="TOML file of settings.", envvar=model.variable("config"), show_envvar=False),
            ],
        )
        parameters = [
            *(p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY),
            *(p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY),
            *flags,
            config,
        ]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def group_of(field: FieldInfo) -> str:
    """Heading under which the help lists a setting."""
    return str(field.json_schema_extra["group"]) if isinstance(field.json_schema_extra, dict) else ""


def default_text(field: FieldInfo) -> str:
    """A setting's default as the help shows it; empty for none."""
    match field.default:
        case None | "" | ():
            return ""
        case dict(value) if not value:
            return ""
        case bool(value):
            return "on" if value else "off"
        case float(value):
            return f"{value:g}"
        case tuple(values):
            return ", ".join(map(str, values))
        case value:
            return str(value)


def _parameter(model: type[Settings], name: str) -> inspect.Parameter:
    field, flag = model.model_fields[name], model.flag(name)
    default = default_text(field)
    kind = _flag_type(field.annotation)
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag,
        help=escape((field.description or "") + (f"  [default: {default}]" if default else "")),
        rich_help_panel=group_of(field),
        show_default=False,
        case_sensitive=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag_type(annotation: Any) -> Any:
    """The type that the command line reads; the model checks the rest."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = [part for part in get_args(annotation) if part is not type(None)]
    if annotation is SecretStr:
        return str
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return list[str if issubclass(item, BaseModel) else item]  # type: ignore[misc]
    if get_origin(annotation) is dict:
        return str
    if get_origin(annotation) is Annotated:
        return _flag_type(get_args(annotation)[0])
    if get_origin(annotation) is Literal or annotation in (bool, int, float, str, Path):
        return annotation
    raise TypeError(f"no flag for a setting of the type {annotation}")

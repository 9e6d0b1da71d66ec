"""Logging of the server: plain lines or JSON, each with the request's id."""

import logging
import re
import secrets
import sys
from contextvars import ContextVar
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

__all__ = [
    "REQUEST_ID_HEADER",
    "LogFormat",
    "configure_logging",
    "keep_secrets_out",
    "new_request_id",
    "request_id",
]

LogFormat = Literal["text", "json"]
REQUEST_ID_HEADER = "x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")

request_id: ContextVar[str] = ContextVar("bitneck_request_id", default="-")
"""The id of the call that is being served in this context."""


def new_request_id(given: str) -> str:
    """The caller's id if it is well-formed, else a new one. Log lines carry it from here on."""
    value = given if _WELL_FORMED.match(given) else secrets.token_hex(8)
    request_id.set(value)
    return value


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure_logging(level: str, fmt: LogFormat) -> None:
    """Log to stderr.

    Args:
        level: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
        fmt: lines for people, or one JSON object per line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_WithRequestId())
    if fmt == "json":
        handler.setFormatter(
            JsonFormatter(
                "{asctime}{levelname}{name}{request_id}{message}",
                style="{",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                json_ensure_ascii=False,
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's own, for terminals
            )
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    keep_secrets_out()


def keep_secrets_out() -> None:
    """Let the libraries of HTTP log warnings only: else whole addresses and headers, which may be secrets."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)

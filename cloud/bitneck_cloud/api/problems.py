"""Errors of the control API as problem details (RFC 9457)."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bitneck.errors import BitneckError
from bitneck_cloud.faults import public_text

__all__ = ["PROBLEM_TYPE", "add_error_handlers", "problem"]

PROBLEM_TYPE = "application/problem+json"


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of the application a problem document."""

    @app.exception_handler(BitneckError)
    async def bitneck_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, BitneckError)
        return problem(request, exc.http_status, type(exc).__name__, public_text(exc))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        return problem(request, exc.status_code, None, str(exc.detail), dict(exc.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        details = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'][1:]) or 'body'}: {str(e['msg']).removeprefix('Value error, ')}"
            for e in exc.errors()
        )
        sent = request.headers.get("content-type", "")
        if request.method == "PUT" and not sent.partition(";")[0].strip().lower().endswith("json"):
            details += f"; the body has the type {sent[:80] or '(none)'}, send it with Content-Type: application/json"
        return problem(request, 422, "InvalidRequest", details)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _exc: Exception) -> JSONResponse:
        return problem(request, 500, None, "an internal error; the server's log says why")


def problem(
    request: Request, status: int, kind: str | None, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A problem document.

    Args:
        request: that failed.
        status: of HTTP.
        kind: name of the error's class; None for an error of HTTP alone.
        detail: what is wrong, for people.
        headers: of the response.
    """
    body = {
        "type": f"urn:bitneck:error:{kind}" if kind else "about:blank",
        "title": kind or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
    }
    return JSONResponse(body, status, headers, media_type=PROBLEM_TYPE)

"""The console's files, as the package ships them. They hold no secret, so they need no token."""

from hashlib import sha256
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response

__all__ = ["CONSOLE_PATH", "add_pages", "is_page"]

CONSOLE_PATH = "/console"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere and nothing inline, so what a client's name holds can never run.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DOCS = "api.html"
"""Its page, which Swagger UI fills; that one writes styles into elements."""
_SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the ETag makes it cheap to ask again
}


def is_page(path: str) -> bool:
    """Whether a path belongs to the console's files."""
    return path == CONSOLE_PATH or path.startswith(CONSOLE_PATH + "/")


def add_pages(app: FastAPI) -> None:
    """Serve the console's files below `CONSOLE_PATH`, and the description of the API beside them."""
    ours = files("bitneck_cloud.console") / "static"
    found = [entry for entry in ours.iterdir() if PurePosixPath(entry.name).suffix in _TYPES]
    found += [files("fastapi_offline") / "static" / name for name in _SWAGGER]
    pages = {entry.name: (entry.read_bytes(), _TYPES[PurePosixPath(entry.name).suffix]) for entry in found}

    @app.get("/redoc", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return RedirectResponse(f"{CONSOLE_PATH}/{_DOCS}", 307, _HEADERS)

    @app.get(CONSOLE_PATH, include_in_schema=False)
    def console() -> Response:
        return RedirectResponse(f"{CONSOLE_PATH}/", 308, _HEADERS)

    @app.get(CONSOLE_PATH + "/{name:path}", include_in_schema=False)
    def page(request: Request, name: str) -> Response:
        if (name or "index.html") not in pages:
            raise HTTPException(404, f"the console has no file {name[:80]!r}; it begins at {CONSOLE_PATH}/")
        content, media_type = pages[name or "index.html"]
        headers = _HEADERS | {"etag": f'"{sha256(content).hexdigest()[:32]}"'}
        if name == _DOCS:
            headers |= {
                "content-security-policy": _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
            }
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

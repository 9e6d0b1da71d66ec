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
_HEADERS = {
    # Nothing from elsewhere and nothing inline, so what a client's name holds can never run.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the ETag makes it cheap to ask again
}


def is_page(path: str) -> bool:
    """Whether a path belongs to the console's files."""
    return path == CONSOLE_PATH or path.startswith(CONSOLE_PATH + "/")


def add_pages(app: FastAPI) -> None:
    """Serve the console's files below `CONSOLE_PATH`."""
    folder = files("bitneck_cloud.console") / "static"
    pages = {
        entry.name: (entry.read_bytes(), _TYPES[PurePosixPath(entry.name).suffix])
        for entry in folder.iterdir()
        if PurePosixPath(entry.name).suffix in _TYPES
    }

    @app.get(CONSOLE_PATH, include_in_schema=False)
    def console() -> Response:
        return RedirectResponse(f"{CONSOLE_PATH}/", 308, _HEADERS)

    @app.get(CONSOLE_PATH + "/{name:path}", include_in_schema=False)
    def page(request: Request, name: str) -> Response:
        if (name or "index.html") not in pages:
            raise HTTPException(404, f"the console has no file {name[:80]!r}; it begins at {CONSOLE_PATH}/")
        content, media_type = pages[name or "index.html"]
        tag = f'"{sha256(content).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=_HEADERS | {"etag": tag})
        return Response(content, headers=_HEADERS | {"etag": tag}, media_type=media_type)

"""A real HTTP server that takes webhooks, and misbehaves on request."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

__all__ = ["Receiver", "Reply", "Request"]


@dataclass(frozen=True)
class Request:
    """What came.

    Attributes:
        path: of the URL.
        headers: in lower case.
        body: as it came.
    """

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def numbers(self) -> list[int]:
        """Of the answers in it."""
        return [each["number"] for each in self.answers]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The documents in it."""
        document: dict[str, Any] = json.loads(self.body)
        return list(document["answers"])

    def signed_with(self, key: bytes) -> bool:
        """Whether the signature is right, worked out from the words of the standard."""
        signed = b".".join((self.headers["webhook-id"].encode(), self.headers["webhook-timestamp"].encode(), self.body))
        digest = hmac.new(key, signed, hashlib.sha256).digest()
        return hmac.compare_digest("v1," + base64.b64encode(digest).decode(), self.headers["webhook-signature"])


@dataclass(frozen=True)
class Reply:
    """What to say.

    Attributes:
        status: of HTTP.
        headers: of the answer.
        body: likewise.
        delay_s: before it, and before each byte of the body.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_s: float = 0.0


class Receiver:
    """Takes webhooks.

    Attributes:
        requests: all that came, in order.
        replies: called with each of them; None says 200.
        url: to post to, once it runs.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.replies: Callable[[Request], Reply | None] = lambda _: None
        self.url = ""

    @property
    def accepted(self) -> list[int]:
        """Numbers of the answers in requests that were told 200."""
        return [
            number for request in list(self.requests) if self._said[id(request)] == 200 for number in request.numbers
        ]

    @contextmanager
    def running(self, *, port: int = 0, tls: tuple[Path, Path] | None = None) -> Iterator["Receiver"]:
        """Serve for the length of a block, in a thread.

        Args:
            port: on loopback; 0 for a free one.
            tls: certificate and key.
        """
        self._said: dict[int, int] = getattr(self, "_said", {})
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()  # from here on nobody is refused
        self.url = f"{'https' if tls else 'http'}://localhost:{listener.getsockname()[1]}/answers?key=hush"
        options: dict[str, Any] = {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]} if tls else {}
        server = uvicorn.Server(
            uvicorn.Config(self._app, interface="asgi3", log_level="critical", lifespan="off", **options)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            listener.close()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        request = Request(scope["path"], headers, body)
        reply = self.replies(request) or Reply()
        self._said[id(request)] = reply.status
        self.requests.append(request)
        await asyncio.sleep(reply.delay_s)
        fields = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": fields})
        for at in range(len(reply.body)):
            await send({"type": "http.response.body", "body": reply.body[at : at + 1], "more_body": True})
            await asyncio.sleep(reply.delay_s)
        await send({"type": "http.response.body", "body": b""})

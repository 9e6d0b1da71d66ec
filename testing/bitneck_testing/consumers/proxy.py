"""A real HTTP proxy: it forwards requests, and opens tunnels for TLS."""

import contextlib
import http.client
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["running_proxy"]

_S = 30.0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Proxy"

    def do_POST(self) -> None:
        """Forward a request for a whole URL."""
        self.server.seen.append(self.requestline)
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.closing(http.client.HTTPConnection(url.hostname or "", url.port, timeout=_S)) as onward:
            onward.request("POST", f"{url.path}?{url.query}", body, dict(self.headers.items()))
            answer = onward.getresponse()
            text = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_CONNECT(self) -> None:
        """Open a tunnel."""
        self.server.seen.append(self.requestline)
        host, _, port = self.path.rpartition(":")
        self.close_connection = True
        with socket.create_connection((host, int(port)), timeout=_S) as onward, contextlib.suppress(ConnectionError):
            self.send_response(200)
            self.end_headers()
            others = {self.connection: onward, onward: self.connection}
            while ready := _readable(others):
                for one in ready:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    others[one].sendall(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _readable(connections: Iterable[socket.socket]) -> list[socket.socket]:
    """Those from which something can be read, once there is one."""
    decrypted: list[socket.socket] = [one for one in connections if isinstance(one, ssl.SSLSocket) and one.pending()]
    return decrypted or select.select(list(connections), [], [], _S)[0]


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tls: tuple[Path, Path] | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[str] = []
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: object) -> None:
        """Say nothing of those that go away."""


@contextmanager
def running_proxy(*, tls: tuple[Path, Path] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve for the length of a block.

    Args:
        tls: certificate and key of the proxy itself.

    Yields:
        URL of the proxy, and the first lines of the requests that it got.
    """
    with _Proxy(tls) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://localhost:{proxy.server_port}", proxy.seen
        finally:
            proxy.shutdown()
            thread.join()

"""A real HTTP proxy: it forwards requests, and opens tunnels for TLS."""

import http.client
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        onward = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_S)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        onward.request("POST", f"{url.path}?{url.query}", body, dict(self.headers.items()))
        answer = onward.getresponse()
        text = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        onward.close()

    def do_CONNECT(self) -> None:
        """Open a tunnel."""
        self.server.seen.append(self.requestline)
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=_S) as onward:
            self.send_response(200)
            self.end_headers()
            others = {self.connection: onward, onward: self.connection}
            while ready := select.select(list(others), [], [], _S)[0]:
                for one in ready:
                    data = one.recv(1 << 16)
                    if not data:
                        self.close_connection = True
                        return
                    others[one].sendall(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[str] = []


@contextmanager
def running_proxy() -> Iterator[tuple[str, list[str]]]:
    """Serve for the length of a block.

    Yields:
        URL of the proxy, and the first lines of the requests that it got.
    """
    with _Proxy() as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}", proxy.seen
        finally:
            proxy.shutdown()
            thread.join()

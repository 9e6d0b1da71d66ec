"""The connections of webhooks: deadlines, addresses, proxies, and what happens after a failure."""

import contextlib
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest

from bitneck_cloud.answers.sinks.posting import Poster, Reply
from bitneck_cloud.answers.sinks.settings import WebhookTable
from bitneck_cloud.answers.sinks.state import Queued
from bitneck_cloud.answers.sinks.webhook import WebhookSink
from bitneck_testing.authority import Authority
from bitneck_testing.consumers.proxy import running_proxy
from bitneck_testing.consumers.receiver import Receiver
from bitneck_testing.processes import free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_PATIENCE_S = 20.0


@contextlib.contextmanager
def raw_server(*handlers: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """A server whose connections are handled by one function each, in turn.

    Yields:
        The URL.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        # So small that a body of megabytes waits for a reader, so large that a slow one takes parts of it all the time.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

        def serve() -> None:
            for handle in handlers:
                with listener.accept()[0] as connection, contextlib.suppress(OSError):
                    connection.settimeout(_PATIENCE_S)
                    handle(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        place = f"[{host}]" if ":" in host else host
        yield f"http://{place}:{listener.getsockname()[1]}/hooks?key=hush"
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()


def request_of(connection: socket.socket) -> bytes:
    """The head of the next request; its body is read too."""
    text = b""
    while b"\r\n\r\n" not in text:
        text += connection.recv(1 << 16) or b"\r\n\r\n"
    head, _, body = text.partition(b"\r\n\r\n")
    size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    while len(body) < size:
        body += connection.recv(1 << 16)
    return head


@contextlib.contextmanager
def posting(url: str, **options: Any) -> Iterator[Callable[..., Reply]]:
    """Posts to a URL."""
    poster = Poster(httpx.URL(url), **{"tls_ca": None, "proxy": None} | options)

    def post(body: bytes = b"{}", within_s: float = _PATIENCE_S, **headers: str) -> Reply:
        return poster.post(body, headers, within_s=within_s, most=1000)

    try:
        yield post
    finally:
        poster.close()


def test_a_server_that_crawls_is_left_at_the_deadline() -> None:
    """Whether it reads in small parts, or answers byte by byte: each is a sign of life, and more would come."""
    got: list[int] = []

    def read(connection: socket.socket) -> None:
        got.append(0)
        while part := connection.recv(250_000):
            got[0] += len(part)
            time.sleep(0.1)

    def answer(connection: socket.socket) -> None:
        request_of(connection)
        for byte in itertools.cycle(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100):
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    def say_nothing(connection: socket.socket) -> None:
        request_of(connection)
        assert not connection.recv(1)

    with raw_server(read, answer, say_nothing) as url, posting(url) as post:
        body = bytes(16_000_000)
        with pytest.raises(TimeoutError):
            post(body, within_s=0.5)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                post(within_s=0.5)
    assert 0 < got[0] < len(body)


def test_a_connection_is_kept_and_one_that_ended_is_opened_anew() -> None:
    """Also where the server ends it without a word, or in the middle of an answer."""
    asked: list[int] = []

    def answers(count: int) -> Callable[[socket.socket], None]:
        def handle(connection: socket.socket) -> None:
            for _ in range(count):
                request_of(connection)
                connection.sendall(OK)
            asked.append(count)

        return handle

    def breaks_off(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")

    with raw_server(answers(3), breaks_off, answers(1)) as url, posting(url) as post:
        for _ in range(3):
            assert post().status == 200
        while not asked:
            time.sleep(0.01)
        time.sleep(0.05)  # until the end of the connection has come
        with pytest.raises(OSError, match="peer closed connection"):
            post()
        assert post().status == 200
    assert asked == [3, 1]


def test_a_long_answer_is_not_read_to_its_end() -> None:
    def talk(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(b"HTTP/1.1 500 No\r\nRetry-After: 7\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT011  reset, or a broken pipe
            for _ in range(10_000):
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")

    with raw_server(talk, lambda connection: (request_of(connection), connection.sendall(OK))[1]) as url:
        with posting(url) as post:
            reply = post()
            assert (reply.status, reply.retry_after) == (500, "7")
            assert 1000 < len(reply.body) < 200_000
            assert post().status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_head_of_a_request(host: str) -> None:
    heads: list[bytes] = []

    def handle(connection: socket.socket) -> None:
        heads.append(request_of(connection))
        connection.sendall(OK)

    with raw_server(handle, host=host) as url, posting(url) as post:
        post(Authorization="Bearer x")
    place = url.partition("//")[2].partition("/")[0]
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "POST /hooks?key=hush HTTP/1.1"
    assert {f"Host: {place}", "Authorization: Bearer x", "Content-Length: 2"} <= set(lines)


def test_an_error_that_repeats_the_request_tells_no_secret() -> None:
    with raw_server(lambda connection: connection.sendall(connection.recv(1 << 16))) as url:
        table = {"kind": "webhook", "name": "hook", "url": url, "secret": "0123456789abcdef"}
        sink = WebhookSink(WebhookTable.model_validate(table))
        error = sink.send([Queued(1, 0.0, b"{}")]).error
        sink.close()
    assert "illegal status line" in error
    assert not any(secret in error for secret in ("hush", "/hooks"))


def test_an_error_names_the_proxy() -> None:
    table = {
        "kind": "webhook", "name": "hook", "url": "https://hook.example/x", "secret": "0123456789abcdef",
        "proxy": f"http://127.0.0.1:{free_port()}",
    }  # fmt: skip
    sink = WebhookSink(WebhookTable.model_validate(table))
    error = sink.send([Queued(1, 0.0, b"{}")]).error
    sink.close()
    assert error.startswith(f"https://hook.example, through the proxy {table['proxy']}: ")


def test_an_address_that_is_silent_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of IPv6 often is. All together keep the deadline."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(4):  # nobody accepts, so further ones wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        other = stack.enter_context(socket.create_server(("127.0.0.2", port)))
        found = socket.getaddrinfo
        addresses = {"hooks.test": ["127.0.0.1", "127.0.0.2"], "silent.test": ["127.0.0.1"] * 3}

        def lookup(host: str, *rest: Any, **more: Any) -> Any:
            return [each for name in addresses.get(host, [host]) for each in found(name, *rest, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        thread = threading.Thread(target=lambda: _answer_once(other), daemon=True)
        thread.start()
        with posting(f"http://hooks.test:{port}/") as post:
            assert post(within_s=2.0).status == 200
        thread.join(_PATIENCE_S)
        with posting(f"http://silent.test:{port}/") as post, pytest.raises(TimeoutError):
            post(within_s=0.3)


def _answer_once(listener: socket.socket) -> None:
    with listener.accept()[0] as connection:
        request_of(connection)
        connection.sendall(OK)


def test_a_name_that_cannot_be_looked_up_is_no_connection() -> None:
    for url in ("http://nobody.invalid/", "http://" + "x" * 64 + ".example/"):
        with posting(url) as post, pytest.raises(OSError, match=r"\w"):
            post()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("tls_of_proxy", [False, True])
def test_a_proxy_is_gone_through(
    tls: bool, tls_of_proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forwards plain requests, and opens one tunnel for others."""
    authority = Authority(tmp_path / "ca")
    monkeypatch.setattr(certifi, "where", lambda: str(authority.ca))  # who a proxy is trusted by cannot be set
    certificate = authority.issue("here")
    with (
        Receiver().running(tls=certificate if tls else None) as receiver,
        running_proxy(tls=certificate if tls_of_proxy else None) as (proxy, seen),
        posting(receiver.url, tls_ca=authority.ca, proxy=httpx.URL(proxy)) as post,
    ):
        body = bytes(300_000)
        assert [post(body).status for _ in range(2)] == [200, 200]
    assert [len(request.body) for request in receiver.requests] == [len(body)] * 2
    place = receiver.url.partition("://")[2].partition("/")[0]
    assert seen == ([f"CONNECT {place} HTTP/1.1"] if tls else [f"POST {receiver.url} HTTP/1.1"] * 2)


def test_tls_that_fails_in_a_tunnel_fails_each_time_and_can_be_repaired(tmp_path: Path) -> None:
    """The library keeps such a connection, and waits for its end."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    with Receiver().running(tls=theirs.issue("here")) as receiver, running_proxy() as (proxy, seen):
        with posting(receiver.url, tls_ca=ours.ca, proxy=httpx.URL(proxy)) as post:
            for _ in range(3):
                with pytest.raises(OSError, match="certificate verify failed"):
                    post()
        with posting(receiver.url, tls_ca=theirs.ca, proxy=httpx.URL(proxy)) as post:
            assert post().status == 200
    assert len(seen) == 4


@pytest.mark.parametrize("tls_of_proxy", [False, True])
def test_tls_that_stalls_in_a_tunnel_is_left_at_the_deadline(
    tls_of_proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the proxy speaks TLS, and the server sends byte by byte within it."""
    authority = Authority(tmp_path / "ca")
    monkeypatch.setattr(certifi, "where", lambda: str(authority.ca))

    def crawl(connection: socket.socket) -> None:
        for byte in b"\x16\x03\x03\x40\x00" + bytes(
            1 << 14
        ):  # a record of a handshake, of which the head comes too late
            connection.sendall(bytes([byte]))
            time.sleep(0.2)

    with (
        raw_server(crawl, crawl) as url,
        running_proxy(tls=authority.issue("here") if tls_of_proxy else None) as (proxy, _),
        posting(url.replace("http:", "https:"), proxy=httpx.URL(proxy)) as post,
    ):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                post(within_s=0.6)


def test_only_the_authorities_of_certifi_are_trusted_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the system, nor of OpenSSL's variables."""
    authority = Authority(tmp_path / "ca")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    assert len(ssl.create_default_context().get_ca_certs()) == 1
    with Receiver().running(tls=authority.issue("here")) as receiver, posting(receiver.url) as post:
        with pytest.raises(OSError, match="certificate verify failed"):
            post()

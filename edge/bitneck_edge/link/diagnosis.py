"""Why a connection failed. gRPC only says that it did, so this looks itself: name, port, TLS, certificates, proxy."""

import asyncio
import os
import socket
import ssl
from urllib.parse import urlsplit

from bitneck.errors import Unavailable, Unreachable
from bitneck.settings.model import Address

__all__ = ["proxy_variable", "why"]

_STEP_S = 2.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_TLS_ALERT = 0x15
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def proxy_variable(host: str) -> str:
    """The environment variable whose proxy gRPC uses for a host; empty for none."""
    excepted = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    for entry in (part.strip().lstrip(".") for part in excepted.split(",")):
        if entry and (entry == "*" or host == entry or host.endswith("." + entry)):
            return ""
    return next((name for name in _PROXIES if os.environ.get(name)), "")


async def why(address: str, context: ssl.SSLContext | None) -> Unavailable:
    """The likely cause of a failed connection.

    Args:
        address: HOST:PORT of the server.
        context: for TLS; None for plaintext.

    Returns:
        An error that names the cause; an `Unreachable` where another attempt would give the same. It has a
        `ConnectionRefusedError` as its cause if nothing listens there.
    """
    host, port = Address.parse(address).host, Address.parse(address).port
    if not Address.parse(address).loopback and (variable := proxy_variable(host)):
        proxy = urlsplit(os.environ[variable])
        return Unavailable(
            f"{address}: no connection through the proxy {proxy.hostname}:{proxy.port or 80} that the variable "
            f"{variable} names; if the server can be reached without it, add {host} to no_proxy"
        )
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_STEP_S):
            await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        return Unavailable(f"{address}: the name {host} is not known ({exc.strerror or 'no answer'}); is it right?")
    except TimeoutError:
        return Unavailable(f"{address}: nobody says which address the name {host} has; is the network up?")
    try:
        async with asyncio.timeout(_STEP_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(_HELLO)
                first = await reader.read(9)
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as exc:
        return Unreachable(
            f"{address}: the server's certificate is refused ({exc.verify_message}); give the file of the authority "
            "that signed it (--tls-ca), and the name that the certificate has"
        )
    except ssl.SSLError as exc:
        return _tls_failure(address, exc)
    except ConnectionRefusedError as exc:
        refused = Unavailable(
            f"{address}: nothing listens there (connection refused); is `bitneck-cloud serve` running?"
        )
        refused.__cause__ = exc
        return refused
    except ConnectionError as exc:
        return Unavailable(f"{address}: the server ended the connection at once ({exc.strerror or exc})")
    except OSError as exc:
        return Unavailable(f"{address}: cannot be reached ({exc.strerror or exc})")
    except TimeoutError:
        return Unavailable(f"{address}: no answer; a firewall may drop it, or the server has too much to do")
    if context is None and (first[:1] == bytes([_TLS_ALERT]) or (not first and await _speaks_tls(host, port))):
        return Unreachable(f"{address}: the server wants TLS; give --tls, or --tls-ca with the file of its authority")
    if context is not None and not first:  # after the handshake: a server that is only busy ends it before
        return Unreachable(
            f"{address}: the server ends the connection once it has seen this device's certificate, or that there is "
            "none; give one that it trusts (--tls-cert, --tls-key)"
        )
    if context is None and first and first[3:4] != b"\x04":
        return Unreachable(f"{address}: what answers there is no gRPC server; is it the port of the control API?")
    return Unavailable(f"{address}: the server answers, but gave no connection; it may be starting, or have too many")


async def _speaks_tls(host: str, port: int) -> bool:
    """Whether a server that says nothing to plaintext takes part in a TLS handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over this connection
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(_STEP_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.close()
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "").upper()
    except (OSError, TimeoutError):
        return False
    return True


def _tls_failure(address: str, exc: ssl.SSLError) -> Unavailable:
    reason = (exc.reason or "").upper()
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason or "UNEXPECTED_MESSAGE" in reason:
        return Unreachable(
            f"{address}: the server has no TLS; leave out --tls and the certificates, or ask its operator"
        )
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return Unreachable(f"{address}: the server asks for this device's certificate; give --tls-cert and --tls-key")
    if "ALERT" in reason:
        said = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        return Unreachable(f"{address}: the server refuses this device's certificate ({said}); give one that it trusts")
    return Unavailable(f"{address}: no TLS connection ({exc.reason or exc})")

"""Ask a running server whether it is ready: the health check of containers, also under TLS."""

import http.client
import ipaddress
import json
import ssl
from pathlib import Path

from bitneck.errors import InvalidConfig, Unavailable
from bitneck.settings.model import Address
from bitneck_cloud.settings import CloudSettings

__all__ = ["check_health"]


def check_health(settings: CloudSettings, *, live: bool, timeout_s: float) -> str:
    """The status that the control API of this machine gives.

    Args:
        settings: those that the server runs with; its address of the control API and its certificate count. If the API
            asks callers for a certificate, the server's own is shown.
        live: ask whether the process lives, not whether it takes work.
        timeout_s: for the whole check.

    Raises:
        InvalidConfig: the certificate cannot be used.
        Unavailable: the server does not answer, or is not ready.
    """
    address = _reachable(Address.parse(settings.http))
    path = "/healthz" if live else "/readyz"
    connection: http.client.HTTPConnection
    if settings.tls_cert is None or settings.tls_key is None:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    else:
        context = _own_context(settings.tls_cert, settings.tls_key)
        connection = http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        status = str(json.loads(reply.read(4096)).get("status", reply.reason))
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as exc:
        raise Unavailable(f"{address}{path}: {exc or type(exc).__name__}") from exc
    finally:
        connection.close()
    if reply.status != http.client.OK:
        raise Unavailable(f"{address}{path}: {status}")
    return status


def _reachable(address: Address) -> Address:
    """Where this machine reaches a server that listens on all its addresses."""
    try:
        listens = ipaddress.ip_address(address.host)
    except ValueError:
        return address
    if not listens.is_unspecified:
        return address
    return Address("::1" if listens.version == 6 else "127.0.0.1", address.port)


def _own_context(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS with this machine's own server. Its certificate names it as others call it, so it is not compared."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError) as exc:
        raise InvalidConfig(f"tls_cert {cert} and tls_key {key} cannot be used ({exc})") from exc
    return context

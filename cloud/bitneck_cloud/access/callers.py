"""Who a gRPC call comes from: a device's token or certificate, else its address."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from bitneck_cloud.access.bearers import BearerTokens, Holder

__all__ = ["ANONYMOUS", "Caller", "bearer_token", "caller_of", "host_of"]

_HEADER = "authorization"
_NAMES = ("x509_subject_alternative_name", "x509_subject", "x509_common_name")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: for logs and for limits, such as ``device camera-7``, ``certificate camera-7`` or ``address 10.0.0.7``.
        binding: what its resume tokens are bound to; empty for a caller that is only an address.
        holder: of its bearer token; None without one.
    """

    name: str
    binding: str = ""
    holder: Holder | None = None


ANONYMOUS = Caller("address (unknown)")
"""A caller of whom nothing is known."""


def bearer_token(metadata: Any) -> str:
    """The bearer token of a call's metadata; empty for none."""
    for key, value in metadata or ():
        if key == _HEADER and isinstance(value, str):
            scheme, _, given = value.partition(" ")
            return given if scheme.lower() == "bearer" else ""
    return ""


def caller_of(context: Any, tokens: BearerTokens) -> Caller:
    """Who a call comes from.

    A certificate counts more than a token, and a token with a name more than an address. A certificate counts by the
    names that its authority signed, so a renewed one is the same caller.

    Args:
        context: of the gRPC call.
        tokens: of the devices.
    """
    holder = tokens.find(bearer_token(context.invocation_metadata())) if tokens.needed else None
    certificate = _certificate(context.auth_context() or {})
    if certificate:
        digest = sha256(certificate.encode()).hexdigest()
        common = _text(context.auth_context(), "x509_common_name") or digest[:12]
        return Caller(f"certificate {common[:64]!r} {digest[:8]}", f"certificate {digest}", holder)
    if holder is not None and holder.name:
        return Caller(str(holder), str(holder), holder)
    return Caller(f"address {host_of(context.peer() or '')}", "", holder)


def host_of(peer: str) -> str:
    """The address in what gRPC calls a peer, such as ``ipv4:10.0.0.7:40022`` or ``ipv6:%5B::1%5D:40022``."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind or "(unknown)"
    return rest.rpartition(":")[0].strip("[]")


def _certificate(auth: Any) -> str:
    """The names that a client's certificate stands for; its own digest if it has none."""
    names = [f"{key}={text}" for key in _NAMES if (text := _text(auth, key))]
    if names:
        return "\n".join(names)
    pem = _text(auth, "x509_pem_cert")
    return sha256(pem.encode()).hexdigest() if pem else ""


def _text(auth: Any, key: str) -> str:
    return "\n".join(value.decode(errors="replace") for value in auth.get(key) or ())

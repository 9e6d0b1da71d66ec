"""From the device to the server: name, proxy, route, TLS, protocol, token, clock, stream."""

import asyncio
import os
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import bitneck
from bitneck.errors import (
    BitneckError,
    DeadlineExceeded,
    InvalidConfig,
    ProtocolError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownPoint,
)
from bitneck.manifest import bundle_id_of
from bitneck.settings.model import Address
from bitneck.text import clean_text
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import Open, Opened
from bitneck_edge.doctor.finding import Finding, skipped
from bitneck_edge.link.connection import connect
from bitneck_edge.link.diagnosis import proxy_variable, why
from bitneck_edge.link.remote import MAX_MANIFEST_BYTES, Offer, fetch_manifest, stub_of
from bitneck_edge.settings import EdgeSettings

__all__ = ["check_clock", "check_network"]

_STEP_S = 5.0
_SOON_DAYS = 14
_CLOCK_S = 2.0
_DAY_S = 86_400
_BEHIND = ("server", "protocol", "token", "clock", "stream")


async def check_network(settings: EdgeSettings) -> tuple[list[Finding], Offer | None]:
    """Check the way to the server, step by step. Each step has a limit of time.

    Returns:
        What was found, and the server's offer; None if it gave none.
    """
    where = Address.parse(settings.server)
    variable = "" if where.loopback else proxy_variable(where.host)
    proxy = urlsplit(os.environ[variable]) if variable else None
    via = Address(proxy.hostname or "", proxy.port or 80) if proxy is not None else where
    found = [await _name(via), _proxy(where, variable, via)]
    if found[0].state == "failed":
        return [*found, *skipped(("route", "tls", *_BEHIND), "the address is not known")], None
    route = await _route(settings, via, direct=not variable)
    found.append(route)
    if route.state == "failed":
        return [*found, *skipped(("tls", *_BEHIND), "there is no connection")], None
    try:
        found.append(await _tls(settings, where, direct=not variable))
        if found[-1].state == "failed":
            return [*found, *skipped(_BEHIND, "there is no TLS connection")], None
        offered, offer = await _server(settings)
    except InvalidConfig as exc:
        return [*found, Finding("tls", "failed", str(exc)), *skipped(_BEHIND, "the credentials cannot be used")], None
    found += offered
    if offer is not None:
        found.append(await _stream(settings, offer))
    return found, offer


async def _name(where: Address) -> Finding:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_STEP_S):
            answers = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        text = getattr(exc, "strerror", None) or str(exc)
        advice = "check the name, and the name servers in /etc/resolv.conf"
        return Finding("name", "failed", f"{where.host} is not known ({text})", advice)
    except TimeoutError:
        return Finding(
            "name", "failed", f"nobody says which address {where.host} has", "check that the network and its DNS are up"
        )
    addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    if addresses == [where.host]:
        return Finding("name", "ok", f"{where.host} is an address")
    return Finding("name", "ok", f"{where.host} is {', '.join(addresses[:4])}")


def _proxy(where: Address, variable: str, via: Address) -> Finding:
    if where.loopback:
        return Finding("proxy", "ok", "none is asked for loopback")
    if not variable:
        return Finding("proxy", "ok", "no variable names one for this server")
    return Finding(
        "proxy", "warning", f"the variable {variable} names {via}, and gRPC goes through it",
        f"if the server can be reached without it, add {where.host} to no_proxy",
    )  # fmt: skip


async def _route(settings: EdgeSettings, via: Address, *, direct: bool) -> Finding:
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(max(_STEP_S, settings.connect_timeout_s)):
            _, writer = await asyncio.open_connection(via.host, via.port)
    except (OSError, TimeoutError) as exc:
        if not direct:
            text = getattr(exc, "strerror", None) or "no answer"
            return Finding("route", "failed", f"the proxy {via} cannot be reached ({text})", "is the proxy right?")
        return _told("route", await why(settings.server, None))
    took_ms = (time.perf_counter() - begun) * 1e3
    own = clean_text(str(writer.get_extra_info("sockname")[0]), 60)
    writer.close()
    return Finding("route", "ok", f"{via} from {own}, connected in {took_ms:.0f} ms")


async def _tls(settings: EdgeSettings, where: Address, *, direct: bool) -> Finding:
    access = settings.access
    if not access.tls:
        if where.loopback:
            return Finding("tls", "ok", "plaintext, on this machine")
        advice = "give --tls, or --tls-ca FILE, where others may be on the way"
        return Finding("tls", "warning", "plaintext: everybody on the way can read and change it", advice)
    if not direct:
        return Finding("tls", "skipped", "the connection goes through a proxy; the next checks use it")
    context = access.context()
    try:
        async with asyncio.timeout(_STEP_S):
            _, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
    except (OSError, TimeoutError):
        return _told("tls", await why(settings.server, context))
    certificate = writer.get_extra_info("ssl_object").getpeercert()
    version = writer.get_extra_info("ssl_object").version()
    writer.close()
    return _certificate(certificate or {}, str(version), time.time())


def _certificate(certificate: dict[str, Any], version: str, now: float) -> Finding:
    """How long a server's certificate, which was verified, still holds."""
    names = [str(value) for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - now) / _DAY_S
    text = clean_text(f"{version}, certificate for {', '.join(names[:4])}, {days:.0f} days left", 300)
    if days < _SOON_DAYS:
        return Finding("tls", "warning", text, "the server's operator has to renew it soon")
    return Finding("tls", "ok", text)


async def _server(settings: EdgeSettings) -> tuple[list[Finding], Offer | None]:
    """What the server says to the first call."""
    access, found = settings.access, list[Finding]()
    async with access.channel(MAX_MANIFEST_BYTES) as channel:
        try:
            await access.connected(channel, settings.connect_timeout_s)
        except Unavailable as exc:
            return [_told("server", exc), *skipped(_BEHIND[1:], "there is no connection")], None
        found.append(Finding("server", "ok", f"{settings.server} speaks gRPC"))
        try:
            begun = time.time()
            offer = await fetch_manifest(
                stub_of(channel), settings.model, access, settings.answer_timeout_s, settings.client
            )
            ended = time.time()
        except ProtocolError as exc:
            return [*found, _told("protocol", exc), *skipped(_BEHIND[2:], "the protocols differ")], None
        except BitneckError as exc:
            return [*found, *_refused(exc)], None
    ours = f"{pb.DESCRIPTOR.package}, as bitneck {bitneck.__version__} here; model {offer.model}"
    found.append(Finding("protocol", "ok", f"the server speaks {ours}"))
    found.append(Finding("token", "ok", "accepted" if settings.token else "none was given, and none is asked for"))
    found.append(check_clock(offer.unix_us / 1e6, begun, ended))
    return found, offer


def _refused(exc: BitneckError) -> list[Finding]:
    """Why the first call failed."""
    spoken = Finding("protocol", "ok", f"the server speaks {pb.DESCRIPTOR.package}")
    match exc:
        case Unauthenticated():
            advice = "give the token of this device in BITNECK_EDGE_TOKEN; the server's operator lists it"
            return [spoken, Finding("token", "failed", str(exc), advice), *skipped(_BEHIND[3:], "no access")]
        case UnknownModel() | UnknownPoint():
            return [Finding("protocol", "failed", str(exc), "name one of the server's models with --model"),
                    *skipped(_BEHIND[2:], "no model")]  # fmt: skip
    return [_told("protocol", exc), *skipped(_BEHIND[2:], "the server gave no manifest")]


def check_clock(server_s: float, begun: float, ended: float) -> Finding:
    """How far this device's clock is from the server's.

    Args:
        server_s: the server's clock, seconds since 1970; 0 if it does not say.
        begun: this device's clock before it asked.
        ended: likewise after the answer.
    """
    if not server_s:
        return Finding("clock", "skipped", "the server does not tell its clock; it is older than this device")
    off, unsure = (begun + ended) / 2 - server_s, (ended - begun) / 2
    text = f"{abs(off):.2f} s {'ahead of' if off > 0 else 'behind'} the server's, to within {unsure:.2f} s"
    if abs(off) - unsure <= _CLOCK_S:
        return Finding("clock", "ok", text)
    advice = "set it (timedatectl set-ntp true): times of pictures are wrong, and certificates may be refused"
    return Finding("clock", "warning", text, advice)


async def _stream(settings: EdgeSettings, offer: Offer) -> Finding:
    """Open a session, as `run` does. It ends at once; the server forgets it first, as it had no frame."""
    request = Open(model=offer.model, bundle_id=bundle_id_of(offer.manifest_json), client=settings.client)
    try:
        async with connect(settings.access, settings.connect_timeout_s) as connection:
            async with asyncio.timeout(settings.answer_timeout_s):
                await connection.write(request)
                reply = await connection.read()
            await connection.finish()
    except TimeoutError:
        exc = DeadlineExceeded(f"no answer to Open within {settings.answer_timeout_s:.0f} s")
        return Finding("stream", "failed", str(exc), "a proxy on the way may not pass streams of gRPC (HTTP/2)")
    except BitneckError as exc:
        return _told("stream", exc)
    if not isinstance(reply, Opened):
        return Finding("stream", "failed", f"the first message was {type(reply).__name__}", "is it a bitneck server?")
    asked = f"; it asks for {reply.point}" if reply.point else ""
    return Finding("stream", "ok", f"a session opens; {reply.window} frames may be unanswered{asked}")


def _told(check: str, exc: BitneckError) -> Finding:
    """An error whose message says what to do behind its last semicolon."""
    text, _, advice = str(exc).rpartition("; ")
    return Finding(check, "failed", text or advice, advice if text else "")

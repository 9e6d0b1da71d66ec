"""Channels and calls to the cloud; a call that fails raises one of bitneck's errors."""

import asyncio
import math
import os
import ssl
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from bitneck.errors import (
    GRPC_CODES,
    BitneckError,
    DeadlineExceeded,
    InvalidConfig,
    ProtocolError,
    Unavailable,
    Unreachable,
    error_from_status,
)
from bitneck.settings.model import Address
from bitneck.text import clean_text
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck.wire.compression import inflated
from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck_edge.link.diagnosis import why

__all__ = [
    "MAX_MANIFEST_BYTES",
    "Access",
    "Call",
    "Offer",
    "check_process",
    "fetch_file",
    "fetch_manifest",
    "from_rpc_error",
    "stub_of",
]

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.bdp_probe", 0),  # no pings that a thin link has to carry
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.per_message_decompression", 0),  # a small message must not become a large one in gRPC
    ("grpc.use_local_subchannel_pool", 1),  # an attempt in the background must not make others wait
    ("grpc.enable_retries", 0),  # a stream gets none; the link reconnects by itself
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_MAX_ID = 80
"""Characters of the names of a model and a bundle; a right one has at most 71."""

MAX_ANSWER_BYTES = 1 << 20
"""The class map of 513x513 pixels takes 270 kB if nothing of it can be compressed."""

_CLIENT = ssl.PROTOCOL_TLS_CLIENT

_LEAST_BYTES = 1024
_MOST_CHUNK_BYTES = MAX_MANIFEST_BYTES = 16 << 20
"""A manifest of a thousand points fits."""
_MOST_EMPTY = 16

KEEPALIVE_S = 30.0
"""A half-open connection is found within this time and ten seconds."""

_PATIENT_KEEPALIVE_S = 330.0
_MOST_KEEPALIVE_S = 3600.0

_LOST = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
)
"""Statuses of a connection that broke; another attempt may find a server."""

Call = grpc.aio.StreamStreamCall[pb.ClientMessage, pb.ServerMessage]
"""A stream of frames and answers."""


_used_by: int | None = None
"""The process that has used gRPC first. A child that is forked from it cannot use it."""


def check_process() -> None:
    """Note that this process uses gRPC, or refuse a fork of one that did: calls would hang there.

    Raises:
        InvalidConfig: this process was forked after gRPC was used.
    """
    global _used_by
    if _used_by not in (None, os.getpid()):
        raise InvalidConfig(
            "this process was forked from one that had used a bitneck client. gRPC does not work in a fork: "
            "start it with multiprocessing.get_context('spawn'), or open clients in the children only"
        )
    _used_by = os.getpid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The cloud's address, and this device's credentials.

    Attributes:
        address: HOST:PORT.
        tls: whether the channel is encrypted.
        ca: PEM authorities of the server's certificate; None for the system's.
        cert: this device's PEM certificate, if the server asks for one; else None.
        key: its PEM key.
        token: this device's bearer token; empty for none.
        keepalive_s: seconds without a message after which gRPC asks whether the server is still there.
    """

    address: str
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str = field(default="", repr=False)
    keepalive_s: float = KEEPALIVE_S

    def channel(self, most_bytes: int = MAX_ANSWER_BYTES) -> grpc.aio.Channel:
        """A channel to the server; it connects at its first use.

        Args:
            most_bytes: of a message of the server. A larger one ends its call.

        Raises:
            InvalidConfig: a certificate or key cannot be used.
        """
        options = (
            *_CHANNEL_OPTIONS,
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.max_receive_message_length", most_bytes),
        )
        if Address.parse(self.address).loopback:
            options += (("grpc.enable_http_proxy", 0),)  # a proxy cannot reach this machine's own loopback
        check_process()
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self._credentials(), options=options)

    def slower(self) -> "Access":
        """The same access, with a keepalive that a server or proxy with gRPC's usual policy takes: every five minutes.

        Each further call doubles it, up to an hour.
        """
        return replace(self, keepalive_s=min(max(2 * self.keepalive_s, _PATIENT_KEEPALIVE_S), _MOST_KEEPALIVE_S))

    async def connected(self, channel: grpc.aio.Channel, timeout_s: float, *, patient: bool = False) -> None:
        """Wait until the channel is connected. What is asked for then has other limits: a thin link takes its time.

        Args:
            channel: to the server.
            timeout_s: for connecting. A port that refuses is asked again in this time: the server may be starting.
            patient: the caller tries for ever, with pauses of its own, so a port that refuses ends this at once.

        Raises:
            Unreachable: there is no connection, and waiting does not help.
            Unavailable: no server in time; the message names the cause.
        """
        cause: Unavailable | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and cause is None:
                        cause = await why(self.address, self.context() if self.tls else None)
                        if isinstance(cause, Unreachable) or (patient and _refused(cause)):
                            raise cause
                    await channel.wait_for_state_change(state)
        except TimeoutError as exc:
            if cause is None:
                cause = await why(self.address, self.context() if self.tls else None)
            raise type(cause)(f"{cause} [waited {timeout_s:.1f} s]") from exc

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def _credentials(self) -> grpc.ChannelCredentials:
        """The files, loaded for a check first: gRPC would only fail to connect."""
        self.context()
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca.read_bytes() if self.ca is not None else None,
            private_key=self.key.read_bytes() if self.key is not None else None,
            certificate_chain=self.cert.read_bytes() if self.cert is not None else None,
        )

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS.

        Raises:
            InvalidConfig: a certificate or key cannot be used.
        """
        context = ssl.create_default_context(cafile=None) if self.ca is None else ssl.SSLContext(_CLIENT)
        context.set_alpn_protocols(["h2"])
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=lambda: "")  # never asks the user
        except (OSError, ssl.SSLError) as exc:
            raise InvalidConfig(
                f"tls_ca {self.ca}, tls_cert {self.cert} or tls_key {self.key} cannot be used ({exc}); "
                "give PEM files, and a key without a passphrase that belongs to its certificate"
            ) from exc
        return context


def _refused(cause: Unavailable) -> bool:
    """Whether nothing listens at the address; see `why`."""
    return isinstance(cause.__cause__, ConnectionRefusedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The bundle that a server has.

    Attributes:
        model: id of the served model.
        bundle_id: of its bundle, as the server says.
        manifest_json: the manifest's exact bytes.
        unix_us: the server's clock when it answered, microseconds since 1970; 0 if it does not say.
    """

    model: str
    bundle_id: str
    manifest_json: bytes
    unix_us: int = 0


def stub_of(channel: grpc.aio.Channel) -> "pb_grpc.SplitInferenceAsyncStub":
    """The service's methods on a channel."""
    return pb_grpc.SplitInferenceStub(channel)


def from_rpc_error(exc: grpc.aio.AioRpcError, address: str) -> BitneckError:
    """Bitneck's error for a failed call."""
    code, text = exc.code(), clean_text(exc.details() or "no details")
    if code in _LOST:
        return Unavailable(f"{address}: {text}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(
            f"{address}: no bitneck server, or one that does not speak {pb.DESCRIPTOR.package} ({text}): "
            "install the same version of bitneck on the server and on the device"
        )
    return error_from_status(GRPC_CODES[code.name], text)


async def fetch_manifest(
    stub: "pb_grpc.SplitInferenceAsyncStub", model: str, access: Access, timeout_s: float, client: str = ""
) -> Offer:
    """The manifest that a server offers.

    Args:
        stub: of the server.
        model: a served model; empty for the only one.
        access: to it.
        timeout_s: for the whole call.
        client: the name that this client will say when it opens a session; empty for none.

    Raises:
        UnknownModel: the server does not have the model.
        ProtocolError: the answer cannot be read.
        BitneckError: the call failed.
    """
    try:
        request = pb.GetManifestRequest(model=model, deflate=True, client=client)
        reply = await stub.GetManifest(request, timeout=timeout_s, metadata=access.metadata)
    except grpc.aio.AioRpcError as exc:
        raise from_rpc_error(exc, access.address) from exc
    if reply is None:  # gRPC's way to say that it could not be read
        raise ProtocolError(f"{access.address}: the answer to GetManifest cannot be read")
    return Offer(
        model=clean_text(reply.model, _MAX_ID),
        bundle_id=clean_text(reply.bundle_id, _MAX_ID),
        manifest_json=inflated(reply.manifest_json, reply.size, MAX_MANIFEST_BYTES),
        unix_us=reply.unix_us,
    )


class _Pace:
    """Whether a download goes on: at least some bytes in each window of time, and no chunks without any.

    Args:
        pause_s: longest wait for one chunk; a window is four times as long.
    """

    def __init__(self, pause_s: float) -> None:
        self.window_s = 4 * pause_s
        self._begin = math.inf
        self._came = 0
        self._empty = 0

    def enough(self, size: int, now: float) -> bool:
        """Count a chunk of so many bytes; False if the download is too slow."""
        self._begin = min(self._begin, now)
        self._came += size
        self._empty = 0 if size else self._empty + 1
        if now - self._begin >= self.window_s:
            if self._came < _LEAST_BYTES:
                return False
            self._begin, self._came = now, 0
        return self._empty < _MOST_EMPTY


async def fetch_file(
    stub: "pb_grpc.SplitInferenceAsyncStub",
    model: str,
    bundle_id: str,
    path: str,
    access: Access,
    pause_s: float,
    *,
    offset: int = 0,
    length: int = 0,
) -> AsyncGenerator[bytes]:
    """One file of a bundle, or a part of it, in chunks.

    Args:
        stub: of the server.
        model: a served model.
        bundle_id: of its bundle.
        path: as the manifest lists it.
        access: to it.
        pause_s: longest wait for one chunk. The whole file may take any time, because a link may be thin.
        offset: first byte that is wanted.
        length: bytes that are wanted; 0 for all up to the end.

    Raises:
        DeadlineExceeded: no chunk came in this time, or less than 1 KiB in four times as long.
        BitneckError: the call failed.
    """
    least = _Pace(pause_s)
    request = pb.FetchFileRequest(
        model=model, bundle_id=bundle_id, path=path, offset=offset, length=length, deflate=True
    )
    call = stub.FetchFile(request, metadata=access.metadata)
    try:
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    chunk = await call.read()
            except TimeoutError as exc:
                raise DeadlineExceeded(
                    f"{access.address}: {path} stopped coming; waited {pause_s:.1f} s for more"
                ) from exc
            except grpc.aio.AioRpcError as exc:
                raise from_rpc_error(exc, access.address) from exc
            if not isinstance(chunk, pb.FileChunk):
                return
            if not least.enough(len(chunk.data), time.monotonic()):
                raise DeadlineExceeded(
                    f"{access.address}: {path} comes too slowly, with less than {_LEAST_BYTES} bytes in "
                    f"{least.window_s:.0f} s"
                )
            yield inflated(chunk.data, chunk.size, _MOST_CHUNK_BYTES)
    finally:
        call.cancel()

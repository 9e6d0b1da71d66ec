"""The server: gRPC and HTTP on one event loop, from loading to shutdown."""

import asyncio
import contextlib
import functools
import logging
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from pydantic import SecretStr

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import InvalidConfig
from bitneck.runtime import ModulePool, check_providers, return_freed_memory
from bitneck.settings.model import Address
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.access.security import grpc_credentials, tls_files_usable
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.answers.committing import SinkPublisher
from bitneck_cloud.answers.grpc_events import AnswerStream
from bitneck_cloud.answers.hub import Hub
from bitneck_cloud.answers.presence import Presence
from bitneck_cloud.answers.publishing import Publishing
from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.showing import SinkMetrics
from bitneck_cloud.answers.subscriptions import Subscriptions
from bitneck_cloud.api.grpc_server import HEALTH_NAMES, make_grpc_server
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.api.http_api import build_app
from bitneck_cloud.api.http_guard import HttpGuard, KnownHosts
from bitneck_cloud.api.http_server import HttpServer, listen
from bitneck_cloud.api.readiness import Readiness
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.bundles.watching import FolderMetrics, ServedFolders
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.canary.routes import CanaryMetrics
from bitneck_cloud.descriptors import connections_for_grpc
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.tables import book_of
from bitneck_cloud.observe.audit import RecentChanges, RefusalLog, record
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.observe.tracing import open_traces
from bitneck_cloud.reload import Reloader
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Session
from bitneck_cloud.settings import CloudSettings
from bitneck_cloud.starting import StoppedBefore, last_step, step, waited

__all__ = ["Ready", "load_models", "serve"]

_LOG = logging.getLogger(__name__)
_PRESENCE_S = 1.0
_HOUSEKEEPING_S = 1.0


@dataclass(frozen=True, slots=True)
class Ready:
    """What a running server serves, and where."""

    grpc: str
    http: str
    models: dict[str, ServedModel]


def load_models(bundles: Sequence[Path], threads: int, pool: ModulePool) -> dict[str, ServedModel]:
    """Verify and load bundles.

    Args:
        bundles: folders.
        threads: see `ServedModel`.
        pool: from which the ONNX modules come.

    Raises:
        InvalidConfig: no bundle, or two with one name.
        BundleError, ModelFailure: a bundle cannot be used.
    """
    models: dict[str, ServedModel] = {}
    for path in bundles:
        model = ServedModel(Bundle.open(path), threads=threads, pool=pool)
        if model.name in models:
            raise InvalidConfig(f"{path}: a model {model.name!r} is loaded already; give each bundle its own name")
        model.files.hold()
        models[model.name] = model
    if not models:
        raise InvalidConfig("no bundle to serve: give --bundle DIR")
    return_freed_memory()
    return models


async def serve(settings: CloudSettings, bundles: Sequence[Path], on_ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        settings: addresses and limits.
        bundles: folders.
        on_ready: called once, when both ports take requests.

    Raises:
        InvalidConfig: a port is taken, or a folder has no bundle.
        BundleError, ModelFailure: see `load_models`.
        StateUnusable: the state database, or the queue of sinks, cannot be used.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    groups = Groups(settings.groups)
    fixed = book_of(settings.rates, groups) if settings.rates_are_fixed else None
    fleet = Fleet(groups, fixed, settings.state_db, settings.max_clients)
    outgoing = Outgoing(
        settings.sinks, settings.sinks_queue, server=_name(settings), sync=settings.sinks_sync == "always",
        groups=groups,
    )  # fmt: skip
    try:
        await waited(stopping, "opening state_db", fleet.open())
        await step(stopping, "opening sinks_queue", outgoing.start)
        await _serve(settings, bundles, on_ready, stopping, groups, fleet, outgoing)
    except StoppedBefore:
        _LOG.info("stopped before it had started")
    finally:
        try:
            await fleet.close()
        finally:
            await last_step("closing sinks_queue", outgoing.close)


async def _serve(
    settings: CloudSettings,
    bundles: Sequence[Path],
    on_ready: Callable[[Ready], None],
    stopping: asyncio.Event,
    groups: Groups,
    fleet: Fleet,
    outgoing: Outgoing,
) -> None:
    """The same, with what outlives a run open."""
    check_providers(settings.providers)
    pool = ModulePool(settings.providers)
    models = await step(stopping, "reading the bundles", load_models, bundles, settings.threads, pool)
    metrics, refusals, changes = Metrics(), RefusalLog(), RecentChanges()
    devices, operators = [
        await step(stopping, "reading tokens", BearerTokens, role, _secret(token), file)
        for role, token, file in (
            (Role.DEVICE, settings.device_token, settings.device_tokens),
            (Role.OPERATE, settings.http_token, settings.http_tokens),
        )
    ]
    key = settings.token_key.get_secret_value().encode() if settings.token_key is not None else secrets.token_bytes(32)
    registry = Registry(
        models.values(),
        window=settings.window,
        max_sessions=settings.max_sessions,
        max_sessions_per_caller=settings.max_sessions_per_caller,
        resume_s=settings.resume_s,
        assumed_fps=settings.assumed_fps,
        max_bytes_per_s=settings.max_bytes_per_s,
        signer=TokenSigner(key, max_age_s=settings.token_max_age_s),
        adopt=settings.token_key is not None,
        ended=functools.partial(_record_end, fleet),
    )
    subscriptions = Subscriptions(
        Hub(
            secrets.token_hex(4),
            most=settings.kept_answers,
            most_bytes=settings.kept_answer_bytes,
            first=1 + await step(stopping, "reading sinks_queue", outgoing.last_number),
        ),
        most=settings.max_subscribers,
        metrics=metrics,
        heartbeat_s=settings.heartbeat_s,
        stall_s=settings.stall_s,
        groups=groups,
    )
    publisher = SinkPublisher(outgoing) if settings.sinks else None
    publishing = Publishing(_name(settings), subscriptions, metrics, publisher)
    engine = Engine(
        max_batch=settings.max_batch,
        max_batch_s=settings.max_batch_ms / 1e3,
        max_queue=settings.max_queue,
        decode_threads=settings.decode_threads,
        metrics=metrics,
        publishing=publishing,
    )
    tracer = open_traces(settings.traces, settings.trace_ratio)
    limits = CallerLimits(
        max_calls=settings.max_calls_per_caller,
        max_frames_per_s=settings.max_frames_per_s,
        max_bytes_per_s=settings.max_bytes_per_s,
    )
    earlier = EarlierBundles(settings.earlier, most=settings.earlier_most, most_age_s=settings.earlier_days * 86_400)
    for served in models.values():
        await earlier.keep_first(served.bundle)
    service = InferenceService(
        registry, engine, metrics, tracer, devices, limits, AnswerStream(subscriptions, registry, operators),
        idle_s=settings.idle_s, stall_s=settings.stall_s, similar_bytes=settings.similar_bytes,
        tls=settings.tls_cert is not None,
        earlier=lambda name, bundle_id: earlier.generation(registry, name, bundle_id, pool, settings.threads),
        look=lambda name: canaries.look(name),
    )  # fmt: skip
    fleet.serve(registry, service)
    roots, bundle_changes = {model.name: model.bundle.root for model in models.values()}, Changes()
    canaries = Canaries(
        registry, Candidates(settings.candidates), fleet, service, pool, settings.threads, earlier,
        settings.canary_photos, bundle_changes,
    )  # fmt: skip
    await canaries.resume()
    outgoing.check_served({name: served.labels for name, served in registry.models.items()})
    reloader = Reloader(registry, roots, pool, settings.threads, metrics, earlier, canaries, bundle_changes)
    readiness, folders = Readiness(), ServedFolders(registry)
    metrics.registry.register(SinkMetrics(outgoing))
    metrics.registry.register(CanaryMetrics(canaries, registry))
    metrics.registry.register(FolderMetrics(folders, registry))
    metrics.gauge("streams", "Open streams.", lambda: service.streams)
    metrics.gauge("open_sessions", "Sessions, disconnected ones included.", lambda: registry.count)
    metrics.gauge("queue_frames", "Frames that wait for the engine.", lambda: engine.waiting)
    metrics.gauge("subscribers", "Subscribers to answers.", lambda: len(subscriptions))
    metrics.gauge("ready", "1 while the server takes new work.", lambda: readiness.ready)
    app = HttpGuard(
        build_app(
            registry,
            service,
            readiness,
            subscriptions=subscriptions,
            fleet=fleet,
            metrics=metrics,
            reloader=reloader,
            canaries=canaries,
            folders=folders,
            outgoing=outgoing,
            engine=engine,
            changes=changes,
            try_photos=settings.try_photos,
        ),
        tokens=operators,
        hosts=KnownHosts(settings.http_hosts, Address.parse(settings.http)),
        metrics=metrics,
        refusals=refusals,
    )
    _warn_of_open_doors(settings, devices)
    http_tls = await step(stopping, "reading tls_cert", _http_tls, settings)
    credentials = await step(stopping, "reading tls_cert", _grpc_tls, settings)
    http = HttpServer(app, http_tls, refusals, stall_s=settings.stall_s)
    with contextlib.ExitStack() as stack:
        changes.listen()
        stack.callback(changes.close)
        http_sockets = [stack.enter_context(listener) for listener in listen(Address.parse(settings.http))]
        server, health_servicer, port = make_grpc_server(
            settings, service, limits, devices, operators, metrics, refusals, credentials=credentials,
            max_connections=connections_for_grpc(
                settings.max_connections, sum(each.files.open_files for each in models.values())
            ),
        )  # fmt: skip
        engine.start()
        await server.start()
        http_task = asyncio.create_task(http.serve(sockets=http_sockets))
        await http.listening.wait()
        for name in HEALTH_NAMES:
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        readiness.ready = not stopping.is_set()
        keeping = [
            asyncio.create_task(_keep_house(registry, refusals)),
            asyncio.create_task(_keep_tokens(devices, service.end_revoked)),
            asyncio.create_task(_keep_tokens(operators, lambda: subscriptions.end_revoked(operators))),
            asyncio.create_task(canaries.watch()),
            asyncio.create_task(folders.watch()),
            asyncio.create_task(fleet.keep()),
        ]
        presence = Presence(outgoing.client_state)
        if settings.sinks:
            keeping.append(asyncio.create_task(_tell_presence(presence, registry, service)))
        grpc_host, http_host = Address.parse(settings.grpc).host, Address.parse(settings.http).host
        http_port = http_sockets[0].getsockname()[1]
        on_ready(Ready(str(Address(grpc_host, port)), str(Address(http_host, http_port)), dict(registry.models)))
        await stopping.wait()
        readiness.ready = False
        await health_servicer.enter_graceful_shutdown()
        if settings.drain_delay_s:
            _LOG.info("not ready any more; stopping in %.1f s", settings.drain_delay_s)
            await asyncio.sleep(settings.drain_delay_s)
        _LOG.info("stopping: waiting up to %.1f s for unanswered frames", settings.drain_s)
        service.drain("the server is stopping")
        await _streams_end(service, settings.drain_s)
        subscriptions.drain("the server is stopping")
        http.should_exit = True  # both at once: each waits a second for subscribers that read nothing
        await server.stop(grace=1.0)
        await engine.stop()
        await publishing.close()
        await http_task
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, canaries.close(), return_exceptions=True)
        presence.look((), service.connected, time.time())
        refusals.flush(all_of_it=True)
        await asyncio.to_thread(tracer.close)


async def _keep_tokens(tokens: BearerTokens, revoke: Callable[[], object]) -> None:
    """Read a token file again when it has changed, and end what tokens have that are gone. Its disk may not answer."""
    disk = DiskThread("bitneck-tokens")
    try:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            try:
                if await disk.run(tokens.refresh):
                    revoke()
            except Exception:  # noqa: BLE001  a bug here must not stop what comes after it
                _LOG.exception("reading tokens again failed; it is tried again")
    finally:
        disk.end()


async def _keep_house(registry: Registry, refusals: RefusalLog) -> None:
    """What has to be done now and then: forget sessions, log sums of refusals."""
    while True:
        await asyncio.sleep(_HOUSEKEEPING_S)
        try:
            registry.expire(time.monotonic())
            refusals.flush()
        except Exception:  # noqa: BLE001  a bug here must not stop what comes after it
            _LOG.exception("housekeeping failed; it goes on")


async def _tell_presence(presence: Presence, registry: Registry, service: InferenceService) -> None:
    """Tell sinks which clients are here."""
    while True:
        try:
            presence.look(registry.sessions(time.monotonic()), service.connected, time.time())
        except Exception:  # noqa: BLE001  a bug here must not end it
            _LOG.exception("sinks could not be told which clients are here; it is tried again")
        await asyncio.sleep(_PRESENCE_S)


def _name(settings: CloudSettings) -> str:
    """Of this server, in documents of answers and states of clients."""
    return settings.server_name or socket.gethostname()


def _record_end(fleet: Fleet, session: Session) -> None:
    fleet.ended(session)
    before = {"client": session.client, "answered": session.answered, "payload_bytes": session.payload_bytes}
    record("session end", f"session {session.session_id}", who="server", before=before)


def _warn_of_open_doors(settings: CloudSettings, devices: BearerTokens) -> None:
    if Address.parse(settings.grpc).loopback:
        return
    if not devices.needed and settings.tls_client_ca is None:
        _LOG.warning("every device that reaches %s may use it: no device_token, device_tokens or tls_client_ca is set",
                     settings.grpc)  # fmt: skip
    if settings.tls_cert is None:
        _LOG.warning("frames and tokens travel in plaintext, as insecure allows")


def _secret(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value is not None else None


async def _streams_end(service: InferenceService, limit_s: float) -> None:
    """Wait until every client has finished, at most `limit_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while service.streams:  # noqa: ASYNC110  only here, at the end, does anyone wait for all streams
                await asyncio.sleep(0.02)


def _grpc_tls(settings: CloudSettings) -> grpc.ServerCredentials | None:
    """None if there is no certificate."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return grpc_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def _http_tls(settings: CloudSettings) -> dict[str, Any]:
    """Uvicorn's settings for TLS; empty if there is no certificate."""
    if settings.tls_cert is None or settings.tls_key is None:
        return {}
    tls_files_usable(settings.tls_cert, settings.tls_key, settings.http_tls_client_ca)
    options: dict[str, Any] = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    if settings.http_tls_client_ca is not None:
        options |= {"ssl_ca_certs": str(settings.http_tls_client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
